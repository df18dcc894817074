"""Assigns score requests to reward workers.

Two kinds of requests share the queue: the reward of a finished sample, and the requests that a
workflow makes during its sample (is the first answer right?). The latter come first, because a
sample waits for each of them; they belong to a lease and end with it. Finished samples of an
evaluation come last.

A request is assigned to the least loaded reward worker until a deadline. An infrastructure error or
a missed deadline is a failed attempt: the request is queued again, until it has failed
reward.max_attempts times. The loss of a reward worker does not count as an attempt. A restarted
controller starts with an empty queue and enqueues every sample without a reward.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from megatron_async_rl.controller.core.actions import Send
from megatron_async_rl.controller.core.fleet import Fleet
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import SampleScored
from megatron_async_rl.protocol.messages import ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import MAX_REWARD, Sample, SampleKey


@dataclass
class ScoringTask:
    request: ScoreRequest
    requester: str = ""  # the rollout worker of a workflow's request; empty: a finished sample
    is_evaluation: bool = False  # of a finished sample
    num_failed: int = 0
    worker: str = ""
    deadline: float = 0.0


class ScoringQueue:
    def __init__(
        self, settings: CoreSettings, state: ControllerState, leases: Leases, fleet: Fleet
    ) -> None:
        self._settings = settings
        self._state = state
        self._leases = leases
        self._fleet = fleet
        self.waiting: deque[ScoringTask] = deque()
        self.waiting_first: deque[ScoringTask] = deque()  # of workflows
        self.waiting_last: deque[ScoringTask] = deque()  # of evaluations
        self.assigned: dict[tuple[SampleKey, int], ScoringTask] = {}

    def enqueue_sample(self, group: Group, index: int) -> None:
        """Queues the scoring of a finished sample, or records the reward that it carries."""
        key = SampleKey(self._state.epoch, group.group_id, group.attempt, index)
        sample = group.samples[index]
        assert sample is not None
        if sample.reward is not None:
            reward, turn_rewards = credited(sample, sample.reward)
            event = SampleScored(group.group_id, index, reward, turn_rewards=turn_rewards)
            self._state.record(event)
            return
        prompt = group.prompt
        request = ScoreRequest(
            key,
            sample.text,
            prompt.row,
            opening_tag=prompt.opening_tag,
            text_ends=sample.text_ends,
        )
        self._enqueue(ScoringTask(request, is_evaluation=group.purpose == "eval"))

    def enqueue_unscored(self, group: Group) -> None:
        """Queues all samples of a restored group that have returned and have no reward."""
        for index, sample in enumerate(group.samples):
            if sample is not None and group.rewards[index] is None:
                self.enqueue_sample(group, index)

    def enqueue_request(self, requester: str, request: ScoreRequest, group: Group) -> None:
        """Queues a request of a workflow."""
        prompt = group.prompt
        request = msgspec.structs.replace(request, row=prompt.row, opening_tag=prompt.opening_tag)
        self._enqueue(ScoringTask(request, requester))

    def assign(self, now: float) -> list[Send]:
        """Assigns requests as far as reward workers are free; answers requests of ended leases."""
        sends: list[Send] = []
        while self._queue and (worker := self._fleet.reward.least_loaded(1, 0)):
            task = self._queue.popleft()
            if (task.request.key, task.request.call) in self.assigned:
                continue  # a duplicate
            if self._is_current(task):
                worker.load += 1
                task.worker, task.deadline = worker.name, now + self._settings.lease_timeout_s
                self.assigned[task.request.key, task.request.call] = task
                sends.append(Send(worker.name, task.request))
            elif task.requester:
                sends.append(refusal(task.requester, task.request, "the lease has ended"))
        return sends

    def complete(self, worker: str, result: ScoreResult) -> ScoringTask | None:
        """Ends the assignment; returns None for a late, duplicate or foreign result."""
        task = self.assigned.get((result.key, result.call))
        if task is None or task.worker != worker:
            return None
        self._unassign(task)
        return task

    def fault(self, task: ScoringTask, result: ScoreResult) -> str:
        """Returns why a result is not a valid score of its sample; empty if it is."""
        for reward in (result.reward, *result.turn_rewards):
            if reward is not None and not abs(reward) <= MAX_REWARD:  # nan
                return f"the reward is {reward}"
        sample = None if task.requester else self._sample(result.key)
        if sample and result.turn_rewards:
            num_turns = len(sample.turns())
            if len(result.turn_rewards) != num_turns:
                return (
                    f"the reward function returned {len(result.turn_rewards)} rewards for a sample "
                    f"of {num_turns} turns; return a number, or one per turn"
                )
        return ""

    def record(self, result: ScoreResult) -> Group | None:
        """Records the score of a finished sample; returns its group, None if that was dropped."""
        group, sample = self._state.groups.get(result.key.group_id), self._sample(result.key)
        if group is None or sample is None or result.reward is None:
            return None
        discount = sample.discount if group.purpose == "train" else 1.0
        reward, turn_rewards = credited(sample, float(result.reward), result.turn_rewards, discount)
        self._state.record(
            SampleScored(group.group_id, result.key.index, reward, result.metrics, turn_rewards)
        )
        return group

    def take_expired(self, now: float) -> list[ScoringTask]:
        """Ends the overdue assignments; assignments are in the order of their deadlines."""
        by_deadline = self.assigned.values()
        expired = list(itertools.takewhile(lambda task: now > task.deadline, by_deadline))
        for task in expired:
            self._unassign(task)
        return expired

    def retry(self, task: ScoringTask) -> bool:
        """Queues a failed request again; returns False if it failed often enough."""
        task.num_failed += 1
        if task.num_failed >= self._settings.max_scoring_attempts:
            return False
        self._enqueue(task)
        return True

    def requeue_from(self, worker: str) -> None:
        """Queues the requests of a lost reward worker again."""
        for task in [task for task in self.assigned.values() if task.worker == worker]:
            self._unassign(task)
            self._enqueue(task)

    def _sample(self, key: SampleKey) -> Sample | None:
        group = self._state.groups.get(key.group_id)
        return group.samples[key.index] if group else None

    @property
    def _queue(self) -> deque[ScoringTask]:
        return self.waiting_first or self.waiting or self.waiting_last

    def _enqueue(self, task: ScoringTask) -> None:
        finished = self.waiting_last if task.is_evaluation else self.waiting
        (self.waiting_first if task.requester else finished).append(task)

    def _unassign(self, task: ScoringTask) -> None:
        del self.assigned[task.request.key, task.request.call]
        if worker := self._fleet.reward.get(task.worker):
            worker.load -= 1

    def _is_current(self, task: ScoringTask) -> bool:
        """False if the group was dropped, or the lease of a workflow's request ended, meanwhile."""
        if task.requester:
            return self._leases.group_of(task.requester, task.request) is not None
        return task.request.key.group_id in self._state.groups


def credited(
    sample: Sample, score: float, turn_scores: Sequence[float] = (), discount: float = 1.0
) -> tuple[float, list[float]]:
    """Returns (reward, rewards of the turns, empty if only the last one has a reward).

    It adds the scores of the turns to the rewards that the sample carries or, without these, the
    score of the whole, which is the last turn's; scores are multiplied by `discount`. The reward is
    the sum. Raises ValueError unless there is one score per turn.
    """
    if not turn_scores and not sample.turn_rewards:
        return score * discount, []
    num_turns = len(sample.turns())
    turn_scores = turn_scores or [*[0.0] * (num_turns - 1), score]
    given = sample.turn_rewards or [0.0] * num_turns
    rewards = [r + discount * s for r, s in zip(given, turn_scores, strict=True)]
    return math.fsum(rewards), rewards


def refusal(requester: str, request: ScoreRequest, error: str) -> Send:
    """Returns the answer to a workflow's request that has no score."""
    return Send(requester, ScoreResult(request.key, None, error, call=request.call))
