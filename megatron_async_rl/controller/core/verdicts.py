"""Which judge scores which sample. A judge that breaks is asked again or another is: never is that a reward of 0."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_async_rl.controller.core.actions import Send
from megatron_async_rl.controller.core.fleet import Fleet
from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.protocol.messages import ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import SampleKey

Key = tuple[int, int]  # (group_id, index)


@dataclass(frozen=True)
class Verdict:
    """One that is under way: who was asked, for which attempt at the group, and until when."""

    judge: str
    attempt: int
    deadline: float


class Verdicts:
    def __init__(self, rules: CoreSettings, state: ControllerState, fleet: Fleet) -> None:
        self._settings = rules
        self._state = state
        self._fleet = fleet
        self.owed: deque[Key] = deque()
        self.under_way: dict[Key, Verdict] = {}

    def owe(self, group: Group, index: int) -> None:
        self.owed.append((group.group_id, index))

    def owe_unjudged(self, group: Group) -> None:
        """A group of an earlier life: whoever was asked then is not known any more."""
        for index, sample in enumerate(group.samples):
            if sample is not None and group.rewards[index] is None:
                self.owe(group, index)

    def ask(self, now: float) -> list[Send]:
        """As many as there are free judges."""
        sends = []
        while self.owed and (judge := self._fleet.free_judge()):
            key = self.owed.popleft()
            group = self._state.groups.get(key[0])
            if group is None or (sample := group.samples[key[1]]) is None:
                continue  # dropped meanwhile
            judge.load += 1
            self.under_way[key] = Verdict(
                judge.name, group.attempt, now + self._settings.lease_timeout_s
            )
            sample_key = SampleKey(self._state.epoch, key[0], group.attempt, key[1])
            score = ScoreRequest(sample_key, sample.text, group.prompt.row)
            sends.append(Send(judge.name, score))
        return sends

    def is_asked_of(self, judge: str, reply: ScoreResult) -> bool:
        """False for a late, duplicate or foreign reply."""
        verdict = self.under_way.get((reply.key.group_id, reply.key.index))
        return (
            verdict is not None
            and reply.key.epoch == self._state.epoch
            and (verdict.judge, verdict.attempt) == (judge, reply.key.attempt)
        )

    def settle(self, key: Key) -> None:
        """The judge is done with it, one way or another."""
        verdict = self.under_way.pop(key)
        if judge := self._fleet.reward.get(verdict.judge):
            judge.load -= 1

    def try_again(self, group: Group, index: int) -> bool:
        """False when this sample was tried often enough."""
        attempts = group.verdict_attempts[index] = group.verdict_attempts.get(index, 0) + 1
        if attempts >= self._settings.max_verdict_attempts:
            return False
        self.owe(group, index)
        return True

    def overdue(self, now: float) -> list[Key]:
        return [key for key, verdict in self.under_way.items() if now > verdict.deadline]

    def take_back(self, judge: str) -> None:
        """What a lost judge owes is owed by another."""
        for key in [key for key, verdict in self.under_way.items() if verdict.judge == judge]:
            del self.under_way[key]
            self.owed.append(key)
