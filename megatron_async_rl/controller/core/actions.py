"""What the core asks of its shell. An event returns these; the shell writes the event's facts first, then acts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_async_rl.controller.core.groups import Group
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.protocol.messages import Message


@dataclass(frozen=True)
class Send:
    """Send this message to the worker of that name."""

    worker: str
    message: Message


@dataclass(frozen=True)
class SendBatch:
    """Train these groups on `version`: all complete, none older than eta."""

    version: int
    groups: list[Group]


@dataclass(frozen=True)
class ResendBatch:
    """Send the recorded batch of `version` again: the trainer has come back from a checkpoint."""

    version: int


@dataclass(frozen=True)
class Dropped:
    group: Group
    reason: DropReason


@dataclass(frozen=True)
class EvalFinished:
    """All evaluation groups have ended; those dropped have no reward."""

    version: int
    groups: list[Group]


@dataclass(frozen=True)
class ServerLost:
    """This rollout worker is gone: nobody is to wait for an answer of it."""

    name: str


Action = Send | SendBatch | ResendBatch | Dropped | EvalFinished | ServerLost
