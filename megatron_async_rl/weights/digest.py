"""Digests of the tensors that each server must hold after a weight update.

SGLang's `/weights_checker` hashes a server's own tensors, which are fused and split
(model/engine/engine_layout.py). The trainer arranges the tensors that it sends in the same way and
hashes them too: an equal digest proves that the bytes arrived at the right place on every rank.

A server on a CPU reports the first 8 bytes of sha256 over a tensor's bytes, one on a GPU the sum
of tile hashes (tile_hash.py). Both kinds can be computed on either device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_async_rl.errors import PublishError
from megatron_async_rl.model.engine import engine_layout
from megatron_async_rl.model.engine.block_fp8 import SCALE_SUFFIX
from megatron_async_rl.model.engine.engine_layout import EngineSlot, engine_slot
from megatron_async_rl.model.shape import ModelShape
from megatron_async_rl.storage.snapshots import DigestKind
from megatron_async_rl.weights import tile_hash

try:
    from megatron_async_rl.weights import tile_hash_triton
except ImportError:  # torch without triton
    tile_hash_triton = None
_TILE_BYTES = 4 * tile_hash.TILE_WORDS
_SUMS_PER_ALLOCATION = 512


def engine_slice(leaf: str, tensor: Tensor, shape: ModelShape, rank: int, tp: int) -> Tensor:
    """Returns the part of a full Hugging Face tensor that rank `rank` of a server holds.

    `leaf`: the module's name (EngineSlot.leaf). Padding of the vocabulary is included.
    """
    num_rows, split = len(tensor), engine_layout.engine_split(leaf, tensor.dim())
    if tp > 1 and split is not None:
        pieces = engine_layout.engine_pieces(leaf, tuple(tensor.shape), shape, tp)
        own = [tensor.narrow(split, start, end - start) for r, start, end in pieces if r == rank]
        tensor = torch.cat(own) if len(own) > 1 else own[0]
    if leaf in engine_layout.VOCABULARY:
        padding = engine_layout.padded_vocabulary(num_rows) // tp - len(tensor)
        if padding:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
    return tensor


@dataclass
class _IncompleteTensor:
    """An engine tensor of which some parts have been added."""

    parts: dict[int, Tensor] = field(default_factory=dict)
    num_hashed: int = 0  # expert parts with their tiles in `tile_sum`
    tile_sum: Tensor | None = None


class EngineDigests:
    """Digests of a server's tensors, computed from the Hugging Face tensors in the order sent.

    The parts of a fused tensor are held until all have been added. With several `expert_owners`
    (weight sources of one pipeline stage) an object sees the experts of one of them: their tile
    sums, and the scales of fp8 experts, are then added up over the owners (`expert_parts`). Where
    that is impossible (`can_sum_experts`) experts are skipped; another object must see all of them.

    A tensor given to `add` may be overwritten once its Megatron parameter is complete. On a GPU
    nothing waits for the device before `result`.
    """

    def __init__(
        self, shape: ModelShape, engine_tp: int, kind: DigestKind = "sha256", expert_owners: int = 1
    ) -> None:
        self._shape = shape
        self._expert_owners = expert_owners
        self.engine_tp = engine_tp
        self._kind = kind
        self._incomplete: dict[str, _IncompleteTensor] = {}
        self._digests: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._expert_sums: dict[str, Tensor] = {}
        self._unused_sums: list[Tensor] = []
        self._expert_scales: list[tuple[str, EngineSlot, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a full Hugging Face tensor in the element type in which it is sent."""
        slot = engine_slot(name, self._shape)
        of_one_owner = slot.is_fused_expert and self._expert_owners > 1
        is_scale = name.endswith(SCALE_SUFFIX)
        if of_one_owner and not self.can_sum_experts(1 if is_scale else tensor.element_size()):
            return
        for rank in range(self.engine_tp):
            local = engine_slice(slot.leaf, tensor, self._shape, rank, self.engine_tp)
            if of_one_owner and is_scale:
                self._expert_scales.append((f"{rank}:{slot.tensor}", slot, local.clone()))
            else:
                self._add_part(f"{rank}:{slot.tensor}", slot, local)

    def can_sum_experts(self, element_bytes: int) -> bool:
        """Returns whether digests of experts can be summed over owners: they are whole tiles."""
        rows = self._shape.expert_ffn_hidden_size // self.engine_tp
        num_bytes = rows * self._shape.hidden_size * element_bytes
        return self._kind == "tiles" and num_bytes % _TILE_BYTES == 0

    def expert_parts(self, owner: int) -> list[Tensor]:
        """Returns this owner's part of the experts' digests, on the CPU, in the same order on all.

        The tile sums, [fused tensors] int64, and the scales of fp8 experts, [owners, elements]
        float32, of which those of other owners are zero.
        """
        sums = list(self._expert_sums.values())
        own = [scale.flatten().cpu() for _, _, scale in self._expert_scales]
        flat = torch.cat(own) if own else torch.zeros(0)
        scales = torch.zeros(self._expert_owners, len(flat))
        scales[owner] = flat
        return [torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64), scales]

    def set_expert_parts(self, totals: Tensor, scales: Tensor) -> None:
        """Takes the sums of all owners' expert_parts (mod 2^64) into `result`."""
        for name, total in zip(self._expert_sums, totals.tolist(), strict=True):
            self._digests[name] = tile_hash.finish(total)
        sizes = [scale.numel() for _, _, scale in self._expert_scales]
        for owner, flat in enumerate(scales):
            parts = zip(self._expert_scales, flat.split(sizes), strict=True)
            for (name, slot, scale), values in parts:
                fused = self._incomplete.setdefault(name, _IncompleteTensor())
                part = slot.part + owner * (slot.num_parts // self._expert_owners)
                fused.parts[part] = values.view(scale.shape).to(scale.device)
        for name in {name for name, _, _ in self._expert_scales}:
            parts_of = self._incomplete.pop(name).parts
            self._digest(name, [parts_of[part] for part in range(len(parts_of))])

    def result(self) -> dict[str, str]:
        """Returns digests by `rank:engine tensor`. Raises PublishError if a part is missing."""
        if self._incomplete:
            parts = {name: sorted(tensor.parts) for name, tensor in self._incomplete.items()}
            raise PublishError(f"fused tensors of which only some parts were sent: {parts}")
        if self._sums:
            totals = torch.stack(list(self._sums.values())).tolist()
            for name, total in zip(self._sums, totals, strict=True):
                self._digests[name] = tile_hash.finish(total)
            self._sums = {}
        return self._digests

    def _add_part(self, name: str, slot: EngineSlot, local: Tensor) -> None:
        fused = self._incomplete.setdefault(name, _IncompleteTensor())
        is_expert = slot.is_fused_expert
        if is_expert and self._kind == "tiles" and local.nbytes % _TILE_BYTES == 0:
            # Experts have equal sizes and begin at tile boundaries: no need to hold a layer's.
            if fused.tile_sum is None:
                fused.tile_sum = self._new_sum(local.device)
            words, num_bytes = tile_hash.as_words(local), slot.num_parts * local.nbytes
            _add_tile_sum(words, fused.tile_sum, slot.part * len(words), num_bytes)
            fused.num_hashed += 1
        else:
            fused.parts[slot.part] = local.clone() if is_expert else local
        expected = slot.num_parts // (self._expert_owners if is_expert else 1)
        if fused.num_hashed + len(fused.parts) < expected:
            return
        del self._incomplete[name]
        if fused.tile_sum is None:
            self._digest(name, [fused.parts[part] for part in range(slot.num_parts)])
        elif self._expert_owners > 1:
            self._expert_sums[name] = fused.tile_sum
        else:
            self._sums[name] = fused.tile_sum

    def _digest(self, name: str, parts: list[Tensor]) -> None:
        if self._kind == "sha256":
            self._digests[name] = sha256(*parts)
            return
        self._sums[name] = self._new_sum(parts[0].device)
        words = tile_hash.as_words(_concatenated(parts))
        _add_tile_sum(words, self._sums[name], 0, 4 * len(words))

    def _new_sum(self, device: torch.device) -> Tensor:
        """Returns one int64 zero. Many are allocated at a time: each is a kernel on a GPU."""
        if not self._unused_sums:
            zeros = torch.zeros(_SUMS_PER_ALLOCATION, dtype=torch.int64, device=device)
            self._unused_sums = list(zeros.unbind())
        return self._unused_sums.pop()


def _add_tile_sum(words: Tensor, total: Tensor, first: int, num_bytes: int) -> None:
    """See tile_hash.add_tile_sum. Uses the triton kernel on a GPU."""
    if words.is_cuda and tile_hash_triton and len(words):
        tile_hash_triton.add_tile_sum(words, total, first, num_bytes)
    else:
        tile_hash.add_tile_sum(words, total, first, num_bytes)


def sha256(*parts: Tensor) -> str:
    """Returns SGLang's digest on a CPU of the concatenated parts: 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Concatenates the parts, flat; without a copy if they are adjacent, as in a bucket."""
    if len(parts) == 1:
        return parts[0]
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        adjacent = part.data_ptr() == end and part.untyped_storage().data_ptr() == storage
        if not adjacent or not part.is_contiguous():
            return torch.cat([part.reshape(-1) for part in parts])
        end += part.nbytes
    return first.as_strided((sum(part.numel() for part in parts),), (1,), first.storage_offset())
