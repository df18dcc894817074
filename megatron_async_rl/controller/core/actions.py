"""The results of Core.handle, which the controller carries out after it has appended the journal
events of the same input."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_async_rl.controller.core.groups import DropReason, EvaluationTask, Group
from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.types import Sample


@dataclass(frozen=True)
class Send:
    """Send the message to the worker of this name."""

    worker: str
    message: Message


@dataclass(frozen=True)
class SendBatch:
    """Train these groups on `version`: all are complete, none exceeds max_staleness."""

    version: int
    groups: list[Group]
    leaders: frozenset[int]  # that get their shares


@dataclass(frozen=True)
class ResendBatch:
    """Send the recorded batch of `version` again: the trainer restarted from a checkpoint."""

    version: int
    leaders: frozenset[int]


@dataclass(frozen=True)
class ServerLost:
    """This rollout worker is gone: nothing may wait for its replies."""

    worker: str


@dataclass(frozen=True)
class ReportEvaluated:
    """A sample of the evaluation has ended. `reward`: None if generation or scoring failed."""

    task: EvaluationTask
    sample: Sample | None
    reward: float | None
    answer: str  # extracted by the reward function; empty if it extracts none


@dataclass(frozen=True)
class FinishEvaluation:
    """No sample of the evaluation is left. `abandoned`: why some are missing, or empty."""

    version: int
    abandoned: str


@dataclass(frozen=True)
class ReportSample:
    """A sample was accepted."""

    sample: Sample


@dataclass(frozen=True)
class ReportStep:
    """The weights are now `version`. `stats`: the trainer's, None for a replayed step."""

    version: int
    stats: dict[str, float] | None


@dataclass(frozen=True)
class ReportDrop:
    group: Group
    reason: DropReason


@dataclass(frozen=True)
class ReportError:
    error: str


@dataclass(frozen=True)
class ReportScoringError:
    """A scoring attempt failed without such a report of its worker. `where`: worker and sample."""

    where: str
    error: str


Action = (
    Send | SendBatch | ResendBatch | ServerLost | ReportEvaluated | FinishEvaluation
    | ReportSample | ReportStep | ReportDrop | ReportError | ReportScoringError
)  # fmt: skip
Actions = list[Action]
