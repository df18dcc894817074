"""What the engine must hold after an update: its own tensors, fused and cut its way, and their digests.

SGLang fuses q, k and v, and gate and up; its tensor-parallel ranks hold shards of them; its vocabulary is padded with
zero rows. `/weights_checker` hashes those local tensors, so the trainer lays the tensors that it sends out the same way
and hashes them too. An equal digest means that the bytes arrived, at the right place, in every rank.

On a CPU the engine's digest is the first 8 bytes of sha256 over the tensor's bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_async_rl.errors import PublishError
from megatron_async_rl.weights.mapping import ModelShape

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
COLUMN_CUT = ("o_proj", "down_proj")  # cut along the input dimension, the others along the output dimension
VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64  # SGLang's padding of the vocabulary


class EngineDigests:
    """Takes the HF tensors as they are sent, in any order; holds a fused tensor's parts until it is whole."""

    def __init__(self, shape: ModelShape, engine_tp: int) -> None:
        self._shape = shape
        self._tp = engine_tp
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """`name`, `tensor`: a full HF tensor in the type in which it is sent."""
        module, _, kind = name.rpartition(".")
        stem, _, leaf = module.rpartition(".")
        fused = next((whole for whole, parts in FUSED.items() if leaf in parts), None)
        if fused is None:
            self._digest(name, leaf, [tensor])
            return
        whole = f"{stem}.{fused}.{kind}"
        parts = self._parts.setdefault(whole, {})
        parts[leaf] = tensor
        if len(parts) == len(FUSED[fused]):
            self._digest(whole, leaf, [parts[part] for part in FUSED[fused]])
            del self._parts[whole]

    def result(self) -> dict[str, str]:
        """Digests by `rank:engine tensor`. Raises PublishError when a part of a fused tensor never came."""
        if self._parts:
            raise PublishError(
                f"not all parts of {sorted(self._parts)} were sent: {[list(p) for p in self._parts.values()]}"
            )
        return self._digests

    def _digest(self, name: str, leaf: str, parts: list[Tensor]) -> None:
        for rank, local in enumerate(self._shards(leaf, parts)):
            self._digests[f"{rank}:{name}"] = digest(local)

    def _shards(self, leaf: str, parts: list[Tensor]) -> Iterator[Tensor]:
        """The local tensor of each engine rank."""
        parts = [_pad_vocabulary(part) if leaf in VOCABULARY else part for part in parts]
        for rank in range(self._tp):
            cuts = [self._cut(leaf, part, rank) for part in parts]
            yield cuts[0] if len(cuts) == 1 else torch.cat(cuts)

    def _cut(self, leaf: str, tensor: Tensor, rank: int) -> Tensor:
        is_cut = leaf in (*COLUMN_CUT, *VOCABULARY, *(part for parts in FUSED.values() for part in parts))
        if self._tp == 1 or not is_cut:
            return tensor
        if leaf in COLUMN_CUT:
            return tensor if tensor.dim() == 1 else tensor.chunk(self._tp, 1)[rank]
        if leaf in ("k_proj", "v_proj") and self._shape.num_query_groups < self._tp:
            copies = self._tp // self._shape.num_query_groups  # ranks that share a key-value head
            return tensor.chunk(self._shape.num_query_groups)[rank // copies]
        return tensor.chunk(self._tp)[rank]


def digest(tensor: Tensor) -> str:
    """SGLang's digest of a tensor on a CPU: 16 hex digits."""
    if tensor.is_cuda:
        tensor = tensor.cpu()
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()[:16]


def _pad_vocabulary(tensor: Tensor) -> Tensor:
    missing = -len(tensor) % VOCABULARY_MULTIPLE
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
