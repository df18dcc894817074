"""The policy as the workflow of one leased sample sees it (workflow.py: Policy)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_async_rl.protocol.messages import Generate, PartialSample, ScoreRequest
from megatron_async_rl.protocol.types import Partial, Segment, join_segments
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Completion

if TYPE_CHECKING:
    from megatron_async_rl.rollout.worker import RolloutWorker

MAX_LEFT = 4096  # samples whose tokens a worker keeps, for a controller that comes back


class SampleLease:
    """A call goes on where an interruption or a crash left it, if it is the same call again."""

    def __init__(
        self, worker: RolloutWorker, lease: Generate, index: int, partial: Partial | None
    ) -> None:
        self.tokenizer = worker.tokenizer
        self._worker = worker
        self._lease = lease
        self._index = index
        self._key = (lease.group_id, index)
        self._num_asked = 0
        left = worker.left.get(self._key)
        if left is not None and left.oldest_version < lease.floor_version:
            left = None
        longer = left is not None and (partial is None or len(left.ids) > len(partial.ids))
        self._partial = left if longer else partial

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        return await self._worker.generate(ids, sampling, self)

    async def judge(self, text: str) -> float:
        self._num_asked += 1
        key = self._lease.key(self._index)
        return await self._worker.ask(ScoreRequest(key, text, call=self._num_asked))

    def left_of(self, ids: list[int]) -> list[Segment]:
        """What an earlier lease has made of just this input: none, when it was another call of the workflow."""
        partial = self._partial
        if (
            partial is None
            or self._lease.purpose != "train"
            or partial.ids[: partial.num_input].tolist() != ids
        ):
            return []
        return partial.segments()

    async def keep(self, ids: list[int], segments: list[Segment], interrupted: bool) -> None:
        """Holds on to the tokens so far; those of an interrupted call go to the controller too."""
        if self._lease.purpose != "train":
            return
        whole = join_segments(np.asarray(ids, np.int32), segments, "length", "")
        partial = Partial(whole.ids, whole.logprobs, whole.versions)
        self._worker.left.pop(self._key, None)
        self._worker.left[self._key] = partial
        while len(self._worker.left) > MAX_LEFT:
            del self._worker.left[next(iter(self._worker.left))]  # the oldest
        if interrupted:
            await self._worker.send(PartialSample(self._lease.key(self._index), partial))
