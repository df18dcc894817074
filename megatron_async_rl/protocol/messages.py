"""Messages between processes: sender, receiver, and the message that answers each.

The controller is one end of each: workers do not talk to each other. Those of weight updates are
in weight_messages.py; wire.py encodes messages, and hub.py, link.py and sync_link.py send them.
Replies with an old epoch or attempt are fenced: they change only a counter.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from megatron_async_rl.protocol.types import (
    Partial,
    Prompt,
    Purpose,
    Sample,
    SampleKey,
    TrainSample,
)

Role = Literal["rollout", "reward", "trainer"]
MAX_ANSWER = 1024  # characters of ScoreResult.answer


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag on the wire is the class name."""


# ---- joining and leaving


class Hello(Message, frozen=True):
    """Worker -> controller, before anything else. Answered by Welcome, or by Refused if the two are
    incompatible.

    Every version of this package must be able to read `name`, `package` and `schema` of every
    other version.
    """

    role: Role
    name: str
    pid: int
    leader: int = -1  # trainer: data-parallel rank if this rank fetches its share; or -1
    capacity: int = 0  # rollout: most samples in flight; reward: most scores at once
    stage: int = -1  # trainer: pipeline stage if this rank sends its weights; or -1
    serving: int = -1  # rollout: verified version that its server serves; -1: none
    tokenizer: str = (
        ""  # tokenizer.fingerprint of the model folder; empty: not needed by the worker
    )
    package: str = ""  # version of this package; link.py fills in this and the next
    schema: str = ""  # digest of all message types, wire.SCHEMA


class Welcome(Message, frozen=True):
    """Controller -> worker."""

    epoch: int


class Refused(Message, frozen=True):
    """Controller -> worker, which then ends with this reason."""

    reason: str


class RejoinRequest(Message, frozen=True):
    """Controller -> worker that it does not know (one of them restarted) or considers lost.

    Answered by a new Hello; a trainer also repeats its unanswered messages.
    """


class Heartbeat(Message, frozen=True):
    """Rollout and reward workers -> controller, every few seconds; a silent worker is lost."""

    running: int = 0
    tokens_generated: int = 0  # since the worker's start
    idle_s: float = 0.0  # rollout: since the worker's start, without a request that its server runs
    engine: dict[str, float] = {}  # rollout: the server's own figures, by the name of the metric


class Shutdown(Message, frozen=True):
    """Controller -> every worker: the run is over; end in order.

    After SIGTERM it is sent again to a trainer rank that waits, and to a worker that joins.
    """

    reason: str


class Failed(Message, frozen=True):
    """Worker -> controller: this worker ends because of `error`, a text for people."""

    error: str


# ---- generation


class Generate(Message, frozen=True):
    """Controller -> rollout worker: a lease of these samples of a group.

    Answered by one Generated or GenerateFailed per index.
    """

    epoch: int
    group_id: int
    attempt: int
    indices: list[int]
    purpose: Purpose
    prompt: Prompt
    max_new_tokens: int
    temperature: float  # 0 is greedy
    partials: list[Partial | None] = []  # one per index, of an earlier lease; or empty
    floor_version: int = 0  # the worker's own partial samples count unless a token is older
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.epoch, self.group_id, self.attempt, index)


class Generated(Message, frozen=True):
    """Rollout worker -> controller: a finished sample."""

    key: SampleKey
    sample: Sample


class PartialSample(Message, frozen=True):
    """Rollout worker -> controller: the tokens of an interrupted sample, kept for its next lease
    in case this worker is lost."""

    key: SampleKey
    partial: Partial


class GenerateFailed(Message, frozen=True):
    """Rollout worker -> controller: this worker cannot generate the sample."""

    key: SampleKey
    error: str


# ---- scoring


class ScoreRequest(Message, frozen=True):
    """Controller -> reward worker; for a workflow's request also rollout worker -> controller,
    which adds the row. Answered by ScoreResult with the same key and call."""

    key: SampleKey
    response: str
    row: dict[str, Any] = {}  # of the dataset
    call: int = 0  # 0: reward of the finished sample; n: n-th request of its workflow, from 1
    opening_tag: str = ""  # the prompt's, if the response begins within thinking
    text_ends: list[int] = []  # of the turns in the response of a finished sample


class ScoreResult(Message, frozen=True):
    """Reward worker -> controller, and on to the rollout worker if a workflow asked: a reward, or
    None with an infrastructure error, which never counts as a reward."""

    key: SampleKey
    reward: float | None
    error: str = ""
    seconds: float = 0.0
    call: int = 0  # that of the ScoreRequest
    answer: str = ""  # extracted from the response, for majority votes; empty if there is none
    metrics: dict[str, float] = {}  # of the reward function, by name; their means are user/NAME
    turn_rewards: list[float] = []  # if the function scores each turn; `reward` is their sum


# ---- training


class GetBatch(Message, frozen=True):
    """Trainer leader -> controller: ready to train on `version`. Answered by TrainBatch.

    A leader that repeats it gets a recorded batch, or Republish, again.
    """

    version: int


class TrainBatch(Message, frozen=True):
    """Controller -> each trainer leader: its data-parallel share of the batch of one step."""

    version: int
    samples: list[TrainSample]


class Republish(Message, frozen=True):
    """Controller -> all leaders that wait for a batch: a server needs the weights of `version`.

    The weight sources offer them, then all continue to wait for the same batch.
    """

    version: int


class CheckpointSaved(Message, frozen=True):
    """Trainer rank 0 -> controller: `version` is saved in run.dir/checkpoints/<folder>. Answered by
    CheckpointCommitted."""

    version: int
    folder: str


class CheckpointCommitted(Message, frozen=True):
    """Controller -> trainer rank 0: the checkpoint has its manifest, or is not usable."""

    version: int


class StepDone(Message, frozen=True):
    """Trainer rank 0 -> controller: the weights are now `version`, with statistics of the step."""

    version: int
    stats: dict[str, float]
    # [probed samples * PROBE_TOKENS] float32, under version - 1; NaN where unknown
    probe_logprobs: np.ndarray = msgspec.field(default_factory=lambda: np.empty(0, np.float32))


# ---- the mismatch probe (controller/monitoring/mismatch.py)


class ProbeWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens of a sample; the logprobs of ids[start:] are wanted."""

    ids: np.ndarray  # [num_tokens] int32
    start: int


class ProbeRequest(Message, frozen=True):
    """Controller -> rollout worker: compute the logprobs of these windows under `version`.

    Answered by ProbeResult, unless a weight update comes first.
    """

    version: int
    windows: list[ProbeWindow]


class ProbeResult(Message, frozen=True):
    """Rollout worker -> controller: logprobs under `version`, temperature 1."""

    version: int
    probe_logprobs: np.ndarray  # [windows * PROBE_TOKENS] float32; NaN after the end of a window


RunMessage = (
    Hello | Welcome | Refused | RejoinRequest | Heartbeat | Shutdown | Failed
    | Generate | Generated | PartialSample | GenerateFailed | ScoreRequest | ScoreResult
    | GetBatch | TrainBatch | Republish | CheckpointSaved | CheckpointCommitted | StepDone
    | ProbeRequest | ProbeResult
)  # fmt: skip
