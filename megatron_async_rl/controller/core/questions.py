"""What workflows ask the judges while a sample is still being made, such as whether a first try was right.

An answer is for the workflow alone: the sample's own reward is another verdict, when it is whole (verdicts.py). Questions
outlive no crash: they belong to a lease, and with it they end.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from megatron_async_rl.controller.core.actions import Action, Send
from megatron_async_rl.controller.core.fleet import Fleet
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.protocol.messages import ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import SampleKey

Key = tuple[SampleKey, int]


@dataclass
class Question:
    worker: str
    ask: ScoreRequest
    attempts: int = 0
    judge: str = ""
    deadline: float = 0.0


class Questions:
    def __init__(self, rules: CoreSettings, leases: Leases, fleet: Fleet) -> None:
        self._settings = rules
        self._leases = leases
        self._fleet = fleet
        self._waiting: deque[Question] = deque()
        self._under_way: dict[Key, Question] = {}

    def put(self, worker: str, ask: ScoreRequest) -> None:
        self._waiting.append(Question(worker, ask))

    def pass_on(self, now: float) -> list[Action]:
        """As many as there are free judges."""
        sends: list[Action] = []
        while self._waiting and (judge := self._fleet.free_judge()):
            question = self._waiting.popleft()
            ask, group = question.ask, self._leases.group_of(question.worker, question.ask)
            if group is None:
                sends.append(refusal(question.worker, ask, "the lease has ended meanwhile"))
                continue
            judge.load += 1
            question.judge, question.deadline = judge.name, now + self._settings.lease_timeout_s
            question.attempts += 1
            self._under_way[ask.key, ask.call] = question
            score = ScoreRequest(ask.key, ask.response, group.prompt.row, ask.call)
            sends.append(Send(judge.name, score))
        return sends

    def answered(self, judge: str, reply: ScoreResult) -> list[Action] | None:
        """None for a late, duplicate or foreign reply."""
        key = (reply.key, reply.call)
        question = self._under_way.get(key)
        if question is None or question.judge != judge:
            return None
        self._end(key)
        if reply.reward is None or not math.isfinite(reply.reward):
            return self._again(question, reply.error or f"the judge said {reply.reward}")
        return [Send(question.worker, reply)]

    def tick(self, now: float) -> list[Action]:
        actions = []
        for key in [key for key, question in self._under_way.items() if now > question.deadline]:
            question = self._end(key)
            actions += self._again(
                question,
                f"no verdict within rollout.lease_timeout_s = {self._settings.lease_timeout_s:g}",
            )
        return actions

    def take_back(self, judge: str) -> None:
        """What a lost judge was asked, another is."""
        for key in [key for key, question in self._under_way.items() if question.judge == judge]:
            self._waiting.append(self._under_way.pop(key))

    def _end(self, key: Key) -> Question:
        question = self._under_way.pop(key)
        if judge := self._fleet.reward.get(question.judge):
            judge.load -= 1
        return question

    def _again(self, question: Question, error: str) -> list[Action]:
        if question.attempts < self._settings.max_verdict_attempts:
            self._waiting.append(question)
            return []
        return [refusal(question.worker, question.ask, error)]


def refusal(worker: str, ask: ScoreRequest, error: str) -> Send:
    return Send(worker, ScoreResult(ask.key, None, error, call=ask.call))
