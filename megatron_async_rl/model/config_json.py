"""The one reader of a model folder's config.json.

Launcher, trainer, rollout workers and `plan-weights` read it through HfConfig. Fields are checked
when they are used: a tool that needs the vocabulary size only does not need a supported model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_async_rl.errors import DataError
from megatron_async_rl.model import families
from megatron_async_rl.model.families import Family
from megatron_async_rl.model.shape import LatentShape, LinearShape, ModelShape

# Megatron's rope_scaling has these values of Llama 3 built in; only the factor can be set.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
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
_YARN = {  # Megatron's defaults, which are the engine's
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
_YARN_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


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


class HfConfig:
    """A folder's config.json. Raises DataError if it is missing or not a JSON object."""

    def __init__(self, model_path: str | Path) -> None:
        self._key = f"model.path = {model_path}"
        self._folder = Path(model_path)
        file = self._folder / "config.json"
        try:
            self.raw: dict[str, Any] = json.loads(file.read_bytes())
        except OSError:
            remedy = "give the folder of a Hugging Face model"
            raise DataError(f"{self._key} has no config.json that can be read", remedy) from None
        except ValueError as e:
            raise DataError(f"{file} is not JSON: {e}", "download the model again") from None
        if not isinstance(self.raw, dict):
            raise DataError(f"{file} is not a JSON object", "download the model again")

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
            f"{self._key}: architecture {architecture} is not supported",
            f"use a model of one of {supported}",
        )

    @property
    def vocab_size(self) -> int:
        """Token ids with an embedding row. A larger id in a request ends the SGLang server."""
        return self._integer("vocab_size")

    @property
    def max_positions(self) -> int | None:
        """max_position_embeddings, where given and not extended by rope scaling."""
        limit = self.raw.get("max_position_embeddings")
        return limit if _rope_type(self._rope) == "default" else None

    def shape(self, vocab_multiple: int = 1) -> ModelShape:
        """Returns the sizes, with the vocabulary padded to a multiple of `vocab_multiple`.

        Raises DataError if the family is not supported or a size is missing.
        """
        family, heads, vocab = self.family, self._integer("num_attention_heads"), self.vocab_size
        hidden = self._integer("hidden_size")
        latent = self._latent_sizes() if family.latent_attention else None
        head = self._integer("head_dim", default=hidden // heads)
        if latent:
            head = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        return ModelShape(
            family=family,
            num_layers=self._integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self._integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=self._integer("num_key_value_heads", default=heads),
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
        raw, family = self.raw, self.family
        self._check_unquantized()
        for key, allowed in (
            ("hidden_act", ("silu", None)),
            ("attention_bias", (False, True, None) if family.qkv_bias else (False, None)),
            ("mlp_bias", (False, None)),
            ("use_sliding_window", (False, None)),
            ("decoder_sparse_step", (1, None)),
            ("mlp_only_layers", ([], None)),
            *(() if not family.router_bias else self._router_rules(family)),
            *(_LINEAR_ATTENTION if family.linear_layer else ()),
        ):
            if raw.get(key) not in allowed:
                raise DataError(
                    f"{self._key}: config.json has {key} = {raw.get(key)!r}; the trainer's "
                    f"{family.name} model supports {allowed[0]!r} only",
                    "use another model",
                )
        rope, latent = self._rope, family.latent_attention
        if family.linear_layer:
            self._check_engine_rope(rope)
        return Architecture(
            family=family,
            layernorm_epsilon=self._number("rms_norm_eps", 1e-6),
            rotary_base=self._number("rope_theta", 10000.0, rope),
            rope_scaling_factor=None if latent else self._rope_scaling_factor(rope),
            yarn=self._yarn(rope) if latent else None,
            max_positions=self._integer("max_position_embeddings", default=4096),
            router_top_k=self._integer("num_experts_per_tok") if family.experts else 0,
            # the engine's defaults
            router_normalizes=bool(raw.get("norm_topk_prob", bool(family.linear_layer))),
            # transformers has 1.0 where it is missing, but 2.5 for latent attention: not guessed
            router_scale=self._number("routed_scaling_factor", None if latent else 1.0),
            rotary_percent=self._number("partial_rotary_factor", family.rotary_percent, rope),
            **(self._router_groups() if latent else {}),
        )

    def _check_unquantized(self) -> None:
        remedy = "use the folder of the same model in bfloat16, float16 or float32"
        for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
            if (self._folder / name).exists():
                problem = f"{self._key}: {name} is in it, and quantized weights cannot be trained"
                raise DataError(problem, remedy)
        for key in ("quantization_config", "compression_config", "quantization"):
            if stated := self.raw.get(key):
                method = stated.get("quant_method") if isinstance(stated, dict) else stated
                raise DataError(
                    f"{self._key}: config.json has {key} ({method or 'no quant_method'}), and "
                    "quantized weights cannot be trained",
                    remedy,
                )

    @property
    def dtype_name(self) -> str | None:
        """Element type of the stored weights, such as bfloat16, where given."""
        name = self.raw.get("dtype") or self.raw.get("torch_dtype")
        return name if isinstance(name, str) else None

    def _expert_sizes(self, family: Family) -> dict[str, int]:
        # transformers 5 writes num_local_experts for most families
        names = ("num_experts", "n_routed_experts", "num_local_experts")
        number = next((name for name in names if name in self.raw), names[0])
        ffn = self._integer("moe_intermediate_size")
        sizes = {"num_experts": self._integer(number), "expert_ffn_hidden_size": ffn}
        if family.dense_layer:
            shared = self._integer("n_shared_experts", least=0)
            if not shared:
                raise DataError(
                    f"{self._key}: config.json has n_shared_experts = 0; the trainer's "
                    f"{family.name} model has shared experts",
                    "use another model",
                )
            sizes["shared_ffn_hidden_size"] = ffn * shared
            sizes["num_dense_layers"] = self._integer("first_k_dense_replace", least=0)
        elif family.linear_layer:
            sizes["shared_ffn_hidden_size"] = self._integer("shared_expert_intermediate_size")
        return sizes

    def _linear_sizes(self) -> LinearShape:
        """Returns the sizes of linear attention; the engine takes layer_types from the interval."""
        interval = self._integer("full_attention_interval")
        layers = range(1, self._integer("num_hidden_layers") + 1)
        types = ["linear_attention" if n % interval else "full_attention" for n in layers]
        if self.raw.get("layer_types") not in (None, types):
            raise DataError(
                f"{self._key}: config.json has other layer_types than full_attention_interval = "
                f"{interval}, which SGLang uses",
                "use a model whose full attention is in the last of every so many layers",
            )
        heads = [self._integer(f"linear_num_{name}_heads") for name in ("key", "value")]
        if heads[1] % heads[0]:
            raise DataError(
                f"{self._key}: config.json has linear_num_key_heads = {heads[0]}, which does not "
                f"divide linear_num_value_heads = {heads[1]}",
                "use the config.json of the model's authors",
            )
        return LinearShape(
            full_attention_interval=interval,
            num_key_heads=heads[0],
            num_value_heads=heads[1],
            key_head_dim=self._integer("linear_key_head_dim"),
            value_head_dim=self._integer("linear_value_head_dim"),
            conv_width=self._integer("linear_conv_kernel_dim"),
        )

    def _check_engine_rope(self, rope: dict[str, Any]) -> None:
        """Raises DataError if SGLang, which reads no rope_parameters, would rotate otherwise."""
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.25)):
            engine = self.raw.get(key, default)
            if rope.get(key, engine) != engine:
                raise DataError(
                    f"{self._key}: config.json has {key} = {rope[key]} in rope_parameters only, "
                    f"and SGLang would use {engine}",
                    f"write {key} at the top level of config.json too",
                )

    def _latent_sizes(self) -> LatentShape:
        heads, kv_heads = (
            self._integer(f"num_{name}_heads") for name in ("attention", "key_value")
        )
        if heads != kv_heads:
            raise DataError(
                f"{self._key}: config.json has num_key_value_heads = {kv_heads}, but latent "
                f"attention has as many as num_attention_heads = {heads}",
                "use the config.json of the model's authors",
            )
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        queries = self.raw.get("q_lora_rank") is not None
        return LatentShape(
            q_lora_rank=self._integer("q_lora_rank") if queries else 0,
            **{name: self._integer(name) for name in names},
        )

    def _router_rules(self, family: Family) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        return _GROUPED_ROUTER if family.latent_attention else _BIASED_ROUTER

    def _router_groups(self) -> dict[str, int]:
        """Returns the groups as Megatron computes them: it adds top_k / groups scores of each.

        The engine and transformers always add two.
        """
        groups, chosen = self._integer("n_group"), self._integer("topk_group")
        top_k = self._integer("num_experts_per_tok")
        if groups == 1:
            return {}
        if top_k // chosen != 2:
            raise DataError(
                f"{self._key}: config.json has num_experts_per_tok = {top_k} and topk_group = "
                f"{chosen}; Megatron scores a group by its best {top_k // chosen} experts, the "
                "engine by its best 2",
                "use a model whose num_experts_per_tok is twice its topk_group",
            )
        return {"router_groups": groups, "router_group_top_k": chosen}

    def _yarn(self, rope: dict[str, Any]) -> dict[str, float] | None:
        if _rope_type(rope) == "default":
            return None
        unknown = sorted(rope.keys() - _YARN_KEYS - _YARN.keys())
        if _rope_type(rope) != "yarn" or unknown:
            raise DataError(
                f"{self._key}: rope_type {_rope_type(rope)!r} {unknown or ''} is not supported",
                f"use a model with rope_type default, or yarn with {', '.join(_YARN)}",
            )
        required = ("factor", "original_max_position_embeddings")
        for name in required:
            if not isinstance(rope.get(name), int | float):
                raise DataError(
                    f"{self._key}: config.json has {name} = {rope.get(name)!r} in its rope_scaling "
                    "of type yarn, expected a number",
                    "use the config.json of the model's authors",
                )
        names = (*_YARN, *required)
        return _YARN | {name: rope[name] for name in names if rope.get(name) is not None}

    @property
    def _rope(self) -> dict[str, Any]:
        # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise DataError(
                f"{self._key}: config.json has {rope!r} as rope_parameters or rope_scaling, "
                "expected an object",
                "use the config.json of the model's authors",
            )
        return rope

    def _rope_scaling_factor(self, rope: dict[str, Any]) -> float | None:
        kind = _rope_type(rope)
        if kind == "default":
            return None
        different = {k: rope[k] for k, v in _LLAMA3_ROPE.items() if rope.get(k, v) != v}
        if kind != "llama3" or different:
            raise DataError(
                f"{self._key}: rope_type {kind!r} {different or ''} is not supported",
                f"use a model with rope_type default, or llama3 with {_LLAMA3_ROPE}",
            )
        return self._number("factor", None, rope)

    def _number(self, key: str, default: float | None, rope: dict[str, Any] | None = None) -> float:
        """Returns a number of `rope` or, where that has none, of the top level; null is none."""
        values = ((rope or {}).get(key), self.raw.get(key), default)
        value = next((value for value in values if value is not None), None)
        if not isinstance(value, int | float):
            raise DataError(
                f"{self._key}: config.json has {key} = {value!r}, expected a number",
                "use the config.json of the model's authors",
            )
        return float(value)

    def _integer(self, key: str, least: int = 1, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or value < least:
            raise DataError(
                f"{self._key}: config.json has {key} = {value!r}, expected an integer of at least "
                f"{least}",
                "use the config.json of a decoder model",
            )
        return value


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))
