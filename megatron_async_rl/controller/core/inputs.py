"""The events that Core.handle takes. The controller's loop feeds them in, one at a time.

Events about a server that takes weights carry the incarnation that they concern: an update runs for
seconds, and the name may belong to a restarted process when the update ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_async_rl.controller.core.groups import EvaluationMode, EvaluationTask
from megatron_async_rl.protocol.messages import Message

# ---- workers


@dataclass(frozen=True)
class RolloutJoined:
    """A rollout worker sent Hello. `serving`: the verified version that its server holds, or -1."""

    worker: str
    capacity: int
    serving: int = -1


@dataclass(frozen=True)
class RewardJoined:
    worker: str
    capacity: int


@dataclass(frozen=True)
class WorkerLost:
    worker: str


@dataclass(frozen=True)
class Received:
    """A message from a worker that has joined; any message shows that the worker is alive."""

    worker: str
    message: Message


# ---- weights of the servers


@dataclass(frozen=True)
class ServerEvent:
    worker: str
    incarnation: int | None = None  # None: the current one


@dataclass(frozen=True)
class UpdateStarted(ServerEvent):
    """The server gets no work until ServerUpdated."""


@dataclass(frozen=True, kw_only=True)
class ServerUpdated(ServerEvent):
    """The server serves `version`; its digests were verified."""

    version: int


@dataclass(frozen=True)
class UpdateFailed(ServerEvent):
    """The server did not take the weights, for a reason that is not its own failure."""


@dataclass(frozen=True, kw_only=True)
class ServerFenced(ServerEvent):
    """The weights of the server cannot be trusted: it loses its work and must end."""

    reason: str


# ---- trainer


@dataclass(frozen=True)
class TrainerJoined:
    leader: int  # data-parallel rank; -1: not a leader


@dataclass(frozen=True)
class BatchRequested:
    """A leader is ready to train on `version`."""

    leader: int
    version: int


@dataclass(frozen=True)
class BatchesHeld:
    """Whether batch selection is suspended because the trainer is sending its weights again."""

    held: bool


# ---- the run


@dataclass(frozen=True)
class AdmissionOpened:
    """Version 0 is served and evaluated: training groups may be admitted."""


@dataclass(frozen=True)
class EvaluationRequested:
    """Generate and score these samples under the served `version` (core/evaluation.py)."""

    version: int
    mode: EvaluationMode
    tasks: list[EvaluationTask]


@dataclass(frozen=True)
class EvaluationAbandoned:
    """The running evaluation ends without the samples that are not complete."""

    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed: silent workers are lost, overdue leases and scores are requeued."""


@dataclass(frozen=True)
class DrainStarted:
    """The run is about to be preempted: nothing is admitted and no batch is selected any more."""


@dataclass(frozen=True)
class RunEnded:
    """The last step is done: every pending group is dropped."""


CoreEvent = (
    RolloutJoined | RewardJoined | WorkerLost | Received
    | UpdateStarted | ServerUpdated | UpdateFailed | ServerFenced
    | TrainerJoined | BatchRequested | BatchesHeld
    | AdmissionOpened | EvaluationRequested | EvaluationAbandoned | Tick | DrainStarted | RunEnded
)  # fmt: skip
