"""A Hugging Face model folder: what its config.json says, and its tensors read by name and index.

Nothing is read before it is asked for, and then only the rows or columns asked for: a rank never holds more of the
model than its own shard and one tensor's cut.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_async_rl.errors import DataError
from megatron_async_rl.weights.mapping import FAMILIES, Family, Index, ModelShape

# Megatron's rope_scaling has these of Llama 3 built in; only the factor is free.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What config.json says that is not a size: the shape's other half."""

    family: Family
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    """Llama 3's rope scaling; None: plain RoPE."""
    max_positions: int
    router_top_k: int = 0
    router_normalizes: bool = True
    """The weights of the chosen experts are made to add up to 1."""


class ModelFolder:
    """The folder that `model.path` names. Raises DataError where it cannot be trained."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise DataError(
                f"model.path = {path} has no config.json; give the folder of a Hugging Face model"
            )
        self.config: dict[str, Any] = json.loads(config_file.read_text())
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] | None = None

    @property
    def family(self) -> Family:
        architectures = self.config.get("architectures") or ["(none named)"]
        for family in FAMILIES:
            if family.architecture == architectures[0]:
                return family
        raise DataError(
            f"model.path = {self.path}: architecture {architectures[0]} is not supported; supported are "
            f"{', '.join(f.architecture for f in FAMILIES)}"
        )

    def shape(self, vocab_multiple: int = 1) -> ModelShape:
        """The model's sizes, with the vocabulary padded to a multiple."""
        c, family = self.config, self.family
        heads, vocab = self._need("num_attention_heads"), self._need("vocab_size")
        return ModelShape(
            family=family,
            num_layers=self._need("num_hidden_layers"),
            hidden_size=self._need("hidden_size"),
            ffn_hidden_size=self._need("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=c.get("num_key_value_heads") or heads,
            kv_channels=c.get("head_dim") or self._need("hidden_size") // heads,
            vocab_size=vocab,
            padded_vocab_size=-(-vocab // vocab_multiple) * vocab_multiple,
            tied=bool(c.get("tie_word_embeddings", False)),
            num_experts=self._need("num_experts") if family.experts else 0,
            expert_ffn_hidden_size=self._need("moe_intermediate_size") if family.experts else 0,
        )

    def architecture(self) -> Architecture:
        """Everything else that a forward pass needs; refuses what Megatron would compute differently."""
        c, family = self.config, self.family
        for key, allowed in (
            ("hidden_act", ("silu", None)),
            ("attention_bias", (False, None) if not family.qkv_bias else (False, True, None)),
            ("mlp_bias", (False, None)),
            ("use_sliding_window", (False, None)),
            ("decoder_sparse_step", (1, None)),
            ("mlp_only_layers", ([], None)),
        ):
            if c.get(key) not in allowed:
                raise DataError(
                    f"model.path = {self.path}: config.json has {key} = {c[key]!r}, which the {family.name} table does "
                    f"not cover; it covers {allowed[0]!r}"
                )
        # transformers 5 writes rope_parameters; older ones wrote rope_theta and rope_scaling.
        rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0)} | (
            c.get("rope_scaling") or {}
        )
        return Architecture(
            family=family,
            layernorm_epsilon=float(c.get("rms_norm_eps", 1e-6)),
            rotary_base=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            rope_scaling_factor=self._rope_scaling(rope),
            max_positions=int(c.get("max_position_embeddings", 4096)),
            router_top_k=int(c.get("num_experts_per_tok", 0)) if family.experts else 0,
            router_normalizes=bool(c.get("norm_topk_prob", False)),
        )

    def read(self, name: str, index: Index) -> Tensor:
        """Part of a tensor, as stored."""
        return self._slice(name)[index]

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        """safetensors' handle on a tensor that is not read yet."""
        files = self._files()
        if name not in files:
            raise DataError(
                f"model.path = {self.path} has no tensor {name}, which {self.family.architecture} needs; is it complete?"
            )
        file = files[name]
        if file not in self._open:
            self._open[file] = safe_open(str(self.path / file), framework="pt")
        return self._open[file].get_slice(name)

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if self._file_of is None:
            index, single = (
                self.path / "model.safetensors.index.json",
                self.path / "model.safetensors",
            )
            if index.is_file():
                self._file_of = json.loads(index.read_text())["weight_map"]
            elif single.is_file():
                with safe_open(str(single), framework="pt") as file:
                    self._file_of = dict.fromkeys(file.keys(), single.name)
            else:
                raise DataError(
                    f"model.path = {self.path} has neither model.safetensors nor model.safetensors.index.json; convert the "
                    "weights to safetensors"
                )
        return self._file_of

    def _need(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int):
            raise DataError(
                f"model.path = {self.path}: config.json has {key} = {value!r}, expected an integer"
            )
        return value

    def _rope_scaling(self, rope: dict[str, Any]) -> float | None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        differing = {k: rope[k] for k, v in _LLAMA3_ROPE.items() if rope.get(k, v) != v}
        if kind != "llama3" or differing:
            raise DataError(
                f"model.path = {self.path}: rope_type {kind!r} {differing or ''} is not supported; supported are default "
                f"and llama3 with {_LLAMA3_ROPE}"
            )
        return float(rope["factor"])
