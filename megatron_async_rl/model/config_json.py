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
from megatron_async_rl.model.families import Family, ModelShape

# Megatron's rope_scaling has these values of Llama 3 built in; only the factor can be set.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What a family with a bias in its routers may have, of what its config.json can express.
_BIASED_ROUTER: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("norm_topk_prob", (True, None)),
    ("n_group", (1, None)),
    ("topk_group", (1, None)),
    ("use_qk_norm", (False, None)),
    ("attention_bias", (True,)),
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
        architecture = (self.raw.get("architectures") or ["(none)"])[0]
        for family in families.FAMILIES:
            if family.architecture == architecture:
                return family
        supported = ", ".join(family.architecture for family in families.FAMILIES)
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
        return ModelShape(
            family=family,
            num_layers=self._integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self._integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=self.raw.get("num_key_value_heads") or heads,
            kv_channels=self.raw.get("head_dim") or hidden // heads,
            vocab_size=vocab,
            padded_vocab_size=-(-vocab // vocab_multiple) * vocab_multiple,
            tied=bool(self.raw.get("tie_word_embeddings", False)),
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
            *(_BIASED_ROUTER if family.router_bias else ()),
        ):
            if raw.get(key) not in allowed:
                raise DataError(
                    f"{self._key}: config.json has {key} = {raw.get(key)!r}; the trainer's "
                    f"{family.name} model supports {allowed[0]!r} only",
                    "use another model",
                )
        rope = self._rope
        return Architecture(
            family=family,
            layernorm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            rotary_base=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling_factor=self._rope_scaling_factor(rope),
            max_positions=int(raw.get("max_position_embeddings", 4096)),
            router_top_k=int(raw.get("num_experts_per_tok", 0)) if family.experts else 0,
            router_normalizes=bool(raw.get("norm_topk_prob", False)),
            router_scale=float(raw.get("routed_scaling_factor") or 1.0),
            rotary_percent=float(
                rope.get(
                    "partial_rotary_factor",
                    raw.get("partial_rotary_factor", family.rotary_percent),
                )
            ),
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
            shared = self._integer("n_shared_experts")
            if not shared:
                raise DataError(
                    f"{self._key}: config.json has n_shared_experts = 0; the trainer's "
                    f"{family.name} model has shared experts",
                    "use another model",
                )
            sizes["shared_ffn_hidden_size"] = ffn * shared
            sizes["num_dense_layers"] = self._integer("first_k_dense_replace")
        return sizes

    @property
    def _rope(self) -> dict[str, Any]:
        # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
        return self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}

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
        return float(rope["factor"])

    def _integer(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int):
            raise DataError(
                f"{self._key}: config.json has {key} = {value!r}, expected an integer",
                "use the config.json of a decoder model",
            )
        return value


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))
