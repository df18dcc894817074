"""What the engine must hold after an update: its own tensors, fused and cut its way, and their digests.

SGLang fuses q, k and v, gate and up, and all experts of a layer; its tensor-parallel ranks hold shards of them; its
vocabulary is padded with zero rows. `/weights_checker` hashes those local tensors, so the trainer lays the tensors that
it sends out the same way and hashes them too. An equal digest means that the bytes arrived, at the right place, in every
rank.

An engine on a CPU takes the first 8 bytes of sha256 over a tensor's bytes, one on a GPU the sum of tile hashes
(tile_hash.py). Either can be computed on either device.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_async_rl.errors import PublishError
from megatron_async_rl.weights import tile_hash
from megatron_async_rl.weights.mapping import ModelShape

Kind = Literal["sha256", "tiles"]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
COLUMN_CUT = (
    "o_proj",
    "down_proj",
)  # cut along the input dimension, the others along the output dimension
VOCABULARY = ("embed_tokens", "lm_head")
VOCABULARY_MULTIPLE = 64  # SGLang's padding of the vocabulary
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_ROW_CUT = (*VOCABULARY, *(part for parts in FUSED.values() for part in parts))


@dataclass(frozen=True, slots=True)
class Place:
    """Where an HF tensor goes in the engine."""

    whole: str
    """The engine's tensor."""
    part: int
    """Which of its parts, in order along its first dimension."""
    num_parts: int
    leaf: str
    """The HF module's own name, such as q_proj: it decides the cut."""


def engine_place(name: str, shape: ModelShape) -> Place:
    if expert := _EXPERT.fullmatch(name):
        number, leaf = int(expert[2]), expert[3]
        if leaf == "down_proj":
            return Place(f"{expert[1]}.w2_weight", number, shape.num_experts, leaf)
        return Place(
            f"{expert[1]}.w13_weight", 2 * number + (leaf == "up_proj"), 2 * shape.num_experts, leaf
        )
    module, _, kind = name.rpartition(".")
    stem, _, leaf = module.rpartition(".")
    for fused, parts in FUSED.items():
        if leaf in parts:
            return Place(f"{stem}.{fused}.{kind}", parts.index(leaf), len(parts), leaf)
    return Place(name, 0, 1, leaf)


def engine_cut(leaf: str, tensor: Tensor, shape: ModelShape, rank: int, tp: int) -> Tensor:
    """What tensor-parallel rank `rank` of the engine holds of a full HF tensor."""
    if leaf in VOCABULARY:
        tensor = _pad_vocabulary(tensor)
    if tp == 1 or leaf not in (*COLUMN_CUT, *_ROW_CUT):
        return tensor
    if leaf in COLUMN_CUT:
        return tensor if tensor.dim() == 1 else tensor.chunk(tp, 1)[rank]
    if leaf in ("k_proj", "v_proj") and shape.num_query_groups < tp:
        copies = tp // shape.num_query_groups  # ranks that share a key-value head
        return tensor.chunk(shape.num_query_groups)[rank // copies]
    return tensor.chunk(tp)[rank]


@dataclass
class _Whole:
    """An engine tensor in the making."""

    parts: dict[int, Tensor] = field(default_factory=dict)
    num_streamed: int = 0  # experts that went into the sum of tiles as they came
    slot: Tensor | None = None


class EngineDigests:
    """Takes the HF tensors as they are sent, in any order; holds a fused tensor's parts until it is whole.

    With several `expert_owners` it sees the experts of one of them. Sums of tile hashes are added up over the owners
    (`expert_sums`, `take_expert_sums`). Where that cannot be (`adds_up`) it passes experts over: they are for an object
    that sees all of them.

    A tensor given to `add` may be overwritten once the parameter that it is part of is complete. On a GPU nothing waits
    for the device before `result`.
    """

    def __init__(
        self, shape: ModelShape, engine_tp: int, kind: Kind = "sha256", expert_owners: int = 1
    ) -> None:
        self._shape = shape
        self._expert_owners = expert_owners
        self.engine_tp = engine_tp
        self._kind = kind
        self._open: dict[str, _Whole] = {}
        self._digests: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._expert_sums: dict[str, Tensor] = {}
        self._slots: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """`name`, `tensor`: a full HF tensor in the type in which it is sent."""
        place = engine_place(name, self._shape)
        if (
            self._expert_owners > 1
            and _is_fused_expert(place)
            and not self.adds_up(tensor.element_size())
        ):
            return
        for rank in range(self.engine_tp):
            local = engine_cut(place.leaf, tensor, self._shape, rank, self.engine_tp)
            self._add_part(f"{rank}:{place.whole}", place, local)

    def adds_up(self, element_bytes: int) -> bool:
        """Whether experts' digests are made of what each owner works out of its own: they are whole tiles."""
        local = (
            self._shape.hidden_size
            * (self._shape.expert_ffn_hidden_size // self.engine_tp)
            * element_bytes
        )
        return self._kind == "tiles" and local % (4 * tile_hash.TILE_WORDS) == 0

    def expert_sums(self) -> Tensor:
        """[fused expert tensors] int64 on the CPU, in one order on all owners: what this one's add up to."""
        if not self._expert_sums:
            return torch.zeros(0, dtype=torch.int64)
        return torch.stack(list(self._expert_sums.values())).cpu()

    def take_expert_sums(self, totals: Tensor) -> None:
        """The sum of all owners' expert_sums (mod 2^64): `result` then has the experts too."""
        for name, total in zip(self._expert_sums, totals.tolist(), strict=True):
            self._digests[name] = tile_hash.finish(total)

    def result(self) -> dict[str, str]:
        """Digests by `rank:engine tensor`. Raises PublishError when a part of a fused tensor never came."""
        if self._open:
            held = {name: sorted(whole.parts) for name, whole in self._open.items()}
            raise PublishError(f"not all parts were sent of: {held}")
        if self._sums:
            totals = torch.stack(list(self._sums.values())).tolist()
            self._digests |= {
                name: tile_hash.finish(total)
                for name, total in zip(self._sums, totals, strict=True)
            }
            self._sums = {}
        return self._digests

    def _add_part(self, name: str, place: Place, local: Tensor) -> None:
        whole = self._open.setdefault(name, _Whole())
        is_expert = _is_fused_expert(place)
        if is_expert and self._kind == "tiles" and local.nbytes % (4 * tile_hash.TILE_WORDS) == 0:
            # experts are of one size and on tile boundaries: no need to hold a layer's until all have come
            whole.slot = self._slot(local.device) if whole.slot is None else whole.slot
            words = tile_hash.as_words(local)
            tile_hash.add_tile_sum(
                words, whole.slot, place.part * len(words), place.num_parts * local.nbytes
            )
            whole.num_streamed += 1
        else:
            whole.parts[place.part] = local.clone() if is_expert else local
        if whole.num_streamed + len(whole.parts) < place.num_parts // (
            self._expert_owners if is_expert else 1
        ):
            return
        del self._open[name]
        if whole.slot is None:
            self._digest(name, [whole.parts[part] for part in range(place.num_parts)])
        elif self._expert_owners > 1:
            self._expert_sums[name] = whole.slot
        else:
            self._sums[name] = whole.slot

    def _digest(self, name: str, parts: list[Tensor]) -> None:
        if self._kind == "sha256":
            self._digests[name] = sha256(*parts)
            return
        self._sums[name] = self._slot(parts[0].device)
        tile_hash.add_tile_sum(tile_hash.as_words(_joined(parts)), self._sums[name])

    def _slot(self, device: torch.device) -> Tensor:
        """One int64 zero; they are made many at a time, for each is a kernel on a GPU."""
        if not self._slots:
            self._slots = list(torch.zeros(512, dtype=torch.int64, device=device).unbind())
        return self._slots.pop()


def _is_fused_expert(place: Place) -> bool:
    return place.whole.endswith(("w13_weight", "w2_weight"))


def sha256(*parts: Tensor) -> str:
    """SGLang's digest on a CPU of the concatenated parts: 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another, flat; no copy where they already lie so in memory, as in a bucket."""
    if len(parts) == 1:
        return parts[0]
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.data_ptr() != end
            or part.untyped_storage().data_ptr() != storage
            or not part.is_contiguous()
        ):
            return torch.cat([part.reshape(-1) for part in parts])
        end += part.nbytes
    return first.as_strided((sum(part.numel() for part in parts),), (1,), first.storage_offset())


def _pad_vocabulary(tensor: Tensor) -> Tensor:
    missing = -len(tensor) % VOCABULARY_MULTIPLE
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
