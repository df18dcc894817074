"""Partial samples that this worker keeps, so that a later lease of a sample resumes from them.

The controller journals those that a weight update interrupted. The tokens sampled while the
controller was down exist only here; when it is back, all its earlier leases are void.
"""

from __future__ import annotations

from megatron_async_rl.protocol.types import Partial

MAX_PARTIALS = 4096
MAX_BYTES = 4 << 30  # with rollout.routing_replay a token may have a kilobyte of experts

SampleId = tuple[int, int]  # group, index: the same under every lease


class PartialStore:
    def __init__(self) -> None:
        self._partials: dict[SampleId, Partial] = {}  # in the order of their last change
        self._num_bytes = 0

    def keep(self, sample: SampleId, partial: Partial) -> None:
        """Forgets the oldest ones beyond the limits, but never this one."""
        if sample in self._partials:
            self._forget(sample)
        self._partials[sample] = partial
        self._num_bytes += _num_bytes(partial)
        while len(self._partials) > MAX_PARTIALS or (
            self._num_bytes > MAX_BYTES and len(self._partials) > 1
        ):
            self._forget(next(iter(self._partials)))

    def _forget(self, sample: SampleId) -> None:
        self._num_bytes -= _num_bytes(self._partials.pop(sample))

    def longest(
        self, sample: SampleId, other: Partial | None, floor_version: int
    ) -> Partial | None:
        """Returns the longer one of the stored partial sample and `other`, the controller's.

        The stored one counts only if none of its tokens is older than `floor_version`.
        """
        own = self._partials.get(sample)
        if own is None or own.oldest_version < floor_version:
            return other
        return own if other is None or len(own.ids) > len(other.ids) else other


def _num_bytes(partial: Partial) -> int:
    arrays = partial.ids, partial.logprobs, partial.versions, partial.experts
    return sum(array.nbytes for array in arrays)
