"""Partial samples that this worker keeps, so that a later lease of a sample resumes from them.

The controller journals those that a weight update interrupted. The tokens sampled while the
controller was down exist only here; when it is back, all its earlier leases are void.
"""

from __future__ import annotations

from megatron_async_rl.protocol.types import Partial

MAX_PARTIALS = 4096

SampleId = tuple[int, int]  # group, index: the same under every lease


class PartialStore:
    def __init__(self) -> None:
        self._partials: dict[SampleId, Partial] = {}  # in the order of their last change

    def keep(self, sample: SampleId, partial: Partial) -> None:
        self._partials.pop(sample, None)
        self._partials[sample] = partial
        while len(self._partials) > MAX_PARTIALS:
            del self._partials[next(iter(self._partials))]

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
