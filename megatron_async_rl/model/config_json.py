"""The one reader of a model folder's config.json.

Launcher, trainer, rollout workers and `plan-weights` read it through HfConfig. Fields are checked
when they are used: a tool that needs the vocabulary size only does not need a supported model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_async_rl.errors import DataError
from megatron_async_rl.model import families, rotary
from megatron_async_rl.model.config_fields import ConfigFields
from megatron_async_rl.model.families import Family
from megatron_async_rl.model.shape import LatentShape, LinearShape, ModelShape

# Values that config.json may have in a family with a bias in its routers.
_BIASED_ROUTER: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("norm_topk_prob", (True, None)),
    ("n_group", (1, None)),
    ("topk_group", (1, None)),
    ("use_qk_norm", (False, None)),
    ("attention_bias", (True,)),
)
# The same for routers that choose among groups of experts (DeepSeek-V3). The engine needs the
# first three, which transformers ignores.
_GROUPED_ROUTER: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("topk_method", ("noaux_tc",)),
    ("scoring_func", ("sigmoid",)),
    ("moe_layer_freq", (1,)),
    ("norm_topk_prob", (True, None)),
    ("rope_interleave", (True, None)),
)
# The same for models with linear attention.
_LINEAR_ATTENTION: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("output_gate_type", (None, "silu", "swish")),
    ("attn_output_gate", (True, None)),
    ("mamba_ssm_dtype", ("float32", None)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Settings of the forward pass that are not sizes (those are in ModelShape)."""

    family: Family
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    """Factor of Llama 3's rope scaling; None: plain RoPE."""
    max_positions: int
    router_top_k: int = 0
    router_normalizes: bool = True
    """Scale the weights of the selected experts so that they sum to 1."""
    router_scale: float = 1.0
    """Factor of the selected experts' weights."""
    rotary_percent: float = 1.0
    """Share of each head's elements that RoPE rotates: the first ones."""
    router_groups: int = 0
    """Groups of experts, 0 or at least 2: a router chooses groups first, then experts in them."""
    router_group_top_k: int = 0
    yarn: dict[str, float] | None = None
    """YaRN's values by their names in config.json, with latent attention only; None: plain RoPE."""


class HfConfig(ConfigFields):
    """A folder's config.json. Raises DataError if it is missing or not a JSON object."""

    @property
    def family(self) -> Family:
        """The entry of the family table. Raises DataError if the architecture is not supported."""
        names = self.raw.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else "(none)"
        latent_queries = self.raw.get("q_lora_rank") is not None
        for family in families.FAMILIES:
            if family.architecture == architecture and (
                not family.latent_attention or family.latent_queries == latent_queries
            ):
                return family
        supported = ", ".join(dict.fromkeys(family.architecture for family in families.FAMILIES))
        raise DataError(
            f"{self.key}: architecture {architecture} is not supported",
            f"use a model of one of {supported}",
        )

    @property
    def vocab_size(self) -> int:
        """Token ids with an embedding row. A larger id in a request ends the SGLang server."""
        return self.integer("vocab_size")

    @property
    def max_positions(self) -> int | None:
        """max_position_embeddings, where given and not extended by rope scaling."""
        key = "max_position_embeddings"
        is_limit = self.raw.get(key) is not None and not rotary.is_scaled(self)
        return self.integer(key) if is_limit else None

    def shape(self, vocab_multiple: int = 1) -> ModelShape:
        """Returns the sizes, with the vocabulary padded to a multiple of `vocab_multiple`.

        Raises DataError if the family is not supported or a size is missing.
        """
        family, heads, vocab = self.family, self.integer("num_attention_heads"), self.vocab_size
        hidden = self.integer("hidden_size")
        latent = self._latent_sizes() if family.latent_attention else None
        head = self.integer("head_dim", default=hidden // heads)
        if latent:
            head = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        return ModelShape(
            family=family,
            num_layers=self.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=self.integer("num_key_value_heads", default=heads),
            kv_channels=head,
            vocab_size=vocab,
            padded_vocab_size=-(-vocab // vocab_multiple) * vocab_multiple,
            tied=bool(self.raw.get("tie_word_embeddings", False)),
            latent=latent,
            linear=self._linear_sizes() if family.linear_layer else None,
            **(self._expert_sizes(family) if family.experts else {}),
        )

    def architecture(self) -> Architecture:
        """Returns the other settings of the forward pass.

        Raises DataError for a setting that Megatron does not support or would compute differently.
        """
        raw, family, latent = self.raw, self.family, self.family.latent_attention
        if self.quantization:
            raise DataError(
                f"{self.key}: {self.quantization}, and quantized weights cannot be trained",
                "use the folder of the same model in bfloat16, float16 or float32",
            )
        router_rules = _GROUPED_ROUTER if latent else _BIASED_ROUTER
        for key, allowed in (
            ("hidden_act", ("silu", None)),
            ("attention_bias", (False, True, None) if family.qkv_bias else (False, None)),
            ("mlp_bias", (False, None)),
            ("use_sliding_window", (False, None)),
            ("decoder_sparse_step", (1, None)),
            ("mlp_only_layers", ([], None)),
            *(router_rules if family.router_bias else ()),
            *(_LINEAR_ATTENTION if family.linear_layer else ()),
        ):
            if raw.get(key) not in allowed:
                raise self.refused(
                    f"{key} = {raw.get(key)!r}; the trainer's "
                    f"{family.name} model supports {allowed[0]!r} only",
                    "use another model",
                )
        return Architecture(
            family=family,
            layernorm_epsilon=self.number("rms_norm_eps", 1e-6),
            max_positions=self.integer("max_position_embeddings", default=4096),
            router_top_k=self._router_top_k() if family.experts else 0,
            # the engine's defaults
            router_normalizes=bool(raw.get("norm_topk_prob", bool(family.linear_layer))),
            # transformers has 1.0 where it is missing, but 2.5 for latent attention: not guessed
            router_scale=self.number("routed_scaling_factor", None if latent else 1.0),
            **rotary.settings(self, family),
            **(self._router_groups() if latent else {}),
        )

    @property
    def quantization(self) -> str:
        """What states that the weights are quantized; empty if they are not."""
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if (self.folder / name).exists():
                return f"{name} is in it"
        for key in ("quantization_config", "compression_config", "quantization"):
            if stated := self.raw.get(key):
                method = stated.get("quant_method") if isinstance(stated, dict) else stated
                return f"config.json has {key} ({method or 'no quant_method'})"
        return ""

    @property
    def dtype_name(self) -> str | None:
        """Element type of the stored weights, such as bfloat16, where given."""
        name = self.raw.get("dtype") or self.raw.get("torch_dtype")
        return name if isinstance(name, str) else None

    def _num_experts(self) -> int:
        # transformers 5 writes num_local_experts for most families
        names = ("num_experts", "n_routed_experts", "num_local_experts")
        return self.integer(next((name for name in names if name in self.raw), names[0]))

    def _router_top_k(self) -> int:
        top_k, experts = self.integer("num_experts_per_tok"), self._num_experts()
        if top_k > experts:
            raise self.refused(f"num_experts_per_tok = {top_k}, but {experts} experts")
        return top_k

    def _expert_sizes(self, family: Family) -> dict[str, int]:
        ffn = self.integer("moe_intermediate_size")
        sizes = {"num_experts": self._num_experts(), "expert_ffn_hidden_size": ffn}
        if family.dense_layer:
            shared = self.integer("n_shared_experts", least=0)
            if not shared:
                raise self.refused(
                    f"n_shared_experts = 0; the trainer's {family.name} model has shared experts",
                    "use another model",
                )
            sizes["shared_ffn_hidden_size"] = ffn * shared
            sizes["num_dense_layers"] = self.integer("first_k_dense_replace", least=0)
        elif family.linear_layer:
            sizes["shared_ffn_hidden_size"] = self.integer("shared_expert_intermediate_size")
        return sizes

    def _linear_sizes(self) -> LinearShape:
        """Returns the sizes of linear attention; the engine takes layer_types from the interval."""
        interval = self.integer("full_attention_interval")
        layers = range(1, self.integer("num_hidden_layers") + 1)
        types = ["linear_attention" if n % interval else "full_attention" for n in layers]
        if self.raw.get("layer_types") not in (None, types):
            raise self.refused(
                f"other layer_types than full_attention_interval = {interval}, which SGLang uses",
                "use a model whose full attention is in the last of every so many layers",
            )
        heads = [self.integer(f"linear_num_{name}_heads") for name in ("key", "value")]
        if heads[1] % heads[0]:
            raise self.refused(
                f"linear_num_key_heads = {heads[0]}, which does not "
                f"divide linear_num_value_heads = {heads[1]}"
            )
        return LinearShape(
            full_attention_interval=interval,
            num_key_heads=heads[0],
            num_value_heads=heads[1],
            key_head_dim=self.integer("linear_key_head_dim"),
            value_head_dim=self.integer("linear_value_head_dim"),
            conv_width=self.integer("linear_conv_kernel_dim"),
        )

    def _latent_sizes(self) -> LatentShape:
        heads, kv_heads = (self.integer(f"num_{name}_heads") for name in ("attention", "key_value"))
        if heads != kv_heads:
            raise self.refused(
                f"num_key_value_heads = {kv_heads}, but latent "
                f"attention has as many as num_attention_heads = {heads}"
            )
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        queries = self.raw.get("q_lora_rank") is not None
        return LatentShape(
            q_lora_rank=self.integer("q_lora_rank") if queries else 0,
            **{name: self.integer(name) for name in names},
        )

    def _router_groups(self) -> dict[str, Any]:
        """Returns the groups as Megatron computes them: it adds top_k / groups scores of each.

        The engine and transformers always add two.
        """
        groups, chosen = self.integer("n_group"), self.integer("topk_group")
        top_k, experts = self._router_top_k(), self._num_experts()
        of_each = experts // groups
        for is_wrong, problem in (
            (experts % groups, f"n_group = {groups}, which does not divide its {experts} experts"),
            (chosen > groups, f"topk_group = {chosen}, more than n_group = {groups}"),
            (
                top_k > chosen * of_each,
                f"num_experts_per_tok = {top_k}, but topk_group = {chosen} groups of {of_each} "
                f"experts (n_group = {groups}) have {chosen * of_each}",
            ),
        ):
            if is_wrong:
                raise self.refused(problem)
        if groups == 1:
            return {}
        if of_each < 2:
            raise self.refused(
                f"n_group = {groups} for {experts} experts, but a group is chosen by its best 2"
            )
        if top_k // chosen != 2:
            raise self.refused(
                f"num_experts_per_tok = {top_k} and topk_group = {chosen}; Megatron scores a group "
                f"by its best {top_k // chosen} experts, the engine by its best 2",
                "use a model whose num_experts_per_tok is twice its topk_group",
            )
        return {"router_groups": groups, "router_group_top_k": chosen}
