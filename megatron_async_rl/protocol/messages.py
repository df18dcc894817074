"""What crosses a process border, who sends it to whom, and what answers it.

wire.py tells how they travel. Everything goes through the controller (a star), so "worker" below means the peer at the
other end of the controller's one socket.

`epoch` is the controller's life, `attempt` counts the leases of one group. A reply that carries an old one changes a
counter and nothing else (fencing).
"""

from __future__ import annotations

from typing import Any, Literal, Union

import msgspec

from megatron_async_rl.protocol.types import (
    FileEntry,
    Partial,
    Prompt,
    Purpose,
    Sample,
    SampleKey,
    TrainSample,
)

Role = Literal["rollout", "reward", "trainer"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag on the wire is the class name."""


# ---- joining and leaving


class Hello(Message, frozen=True):
    """Worker -> controller, first of all. Answered by Welcome or, where the two ends do not match, by Refused.

    Every version of this package must be able to read `name`, `package` and `schema` of any other's.
    """

    role: Role
    name: str
    pid: int
    leader: int = -1  # trainer: data-parallel rank whose share this rank fetches; -1: none
    capacity: int = 0  # rollout: samples in flight at most; reward: verdicts at once
    stage: int = -1  # trainer: pipeline stage whose weights this rank sends; -1: none
    serving: int = (
        -1
    )  # rollout: version that its server holds, verified, with the gate open; -1: none
    tokenizer: str = ""  # tokenizer.fingerprint of the model folder as this worker sees it; empty: it has no use for one
    package: str = ""  # version of this package; filled in by the transport, like the next
    schema: str = ""  # digest of all message types, wire.SCHEMA


class Welcome(Message, frozen=True):
    """Controller -> worker."""

    epoch: int


class Refused(Message, frozen=True):
    """Controller -> worker, which then ends with this reason."""

    reason: str


class RejoinRequest(Message, frozen=True):
    """Controller -> worker whose earlier Hello it does not know (a new life of either) or no longer trusts (it was
    silent for long). Answered by a new Hello; a trainer repeats what it waits for."""


class Heartbeat(Message, frozen=True):
    """Rollout and reward workers -> controller, every few seconds; a worker silent for long is lost."""

    running: int = 0
    tokens_generated: int = 0  # since the worker's start


class Shutdown(Message, frozen=True):
    """Controller -> everyone: the run is over; end in order."""

    reason: str


class Failed(Message, frozen=True):
    """Worker -> controller: this worker ends because of `error`, a text for people."""

    error: str


# ---- generation


class Generate(Message, frozen=True):
    """Controller -> rollout worker: a lease of these samples of a group. One Generated or GenerateFailed per index."""

    epoch: int
    group_id: int
    attempt: int
    indices: list[int]
    purpose: Purpose
    prompt: Prompt
    max_new_tokens: int
    temperature: float  # 0 is greedy
    partials: list[Partial | None] = []  # one per index, of an earlier lease; empty: none
    floor_version: int = 0  # the worker's own partial samples count unless a token is older

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


class ScoreResult(Message, frozen=True):
    """Reward worker -> controller, and on to the rollout worker if a workflow asked: a reward, or
    None with an infrastructure error, which never counts as a reward."""

    key: SampleKey
    reward: float | None
    error: str = ""
    seconds: float = 0.0
    call: int = 0  # that of the ScoreRequest


# ---- training


class GetBatch(Message, frozen=True):
    """Trainer leader -> controller: ready to train on `version`. Answered by TrainBatch or Shutdown."""

    version: int


class TrainBatch(Message, frozen=True):
    """Controller -> each trainer leader: its data-parallel share of the batch of one step."""

    version: int
    samples: list[TrainSample]


class Republish(Message, frozen=True):
    """Controller -> all leaders while they wait for a batch: a server has come (back) and needs the weights of
    `version`. Those who have them offer them; then they go on waiting for the same batch."""

    version: int


class CheckpointSaved(Message, frozen=True):
    """Trainer rank 0 -> controller: the weights and optimizer of `version` lie in run.dir/checkpoints/<folder>."""

    version: int
    folder: str


class StepDone(Message, frozen=True):
    """Trainer rank 0 -> controller: weights are now `version`; statistics of the step that made them."""

    version: int
    stats: dict[str, float]


# ---- weights (controller/publisher.py tells the whole exchange)


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a bucket, in Hugging Face's name and shape."""

    name: str
    dtype: str  # torch's name without the prefix: float32, bfloat16, float16
    shape: list[int]


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that travel as one flattened broadcast, in this order."""

    tensors: list[TensorSpec]


class PublishOffer(Message, frozen=True):
    """Weight source -> controller: version `version` can be sent. Ends with Published."""

    version: int
    source: int  # servers take the buckets of one source after the other, in this order
    num_sources: int
    buckets: list[Bucket]
    backend: Literal["nccl", "gloo"]
    flattened: bool = True


class OpenGroup(Message, frozen=True):
    """Controller -> weight source: make the update group of this membership. Answered by GroupOpened at once; the
    source then waits inside for the engines to join."""

    group: str
    world_size: int


class GroupOpened(Message, frozen=True):
    """Weight source -> controller: where the group's store listens."""

    group: str
    stage: int
    address: str
    port: int


class JoinGroup(Message, frozen=True):
    """Controller -> rollout worker: join the update group of one stage. Answered by GroupJoined."""

    group: str
    address: str
    port: int
    rank_offset: int
    world_size: int
    backend: Literal["nccl", "gloo"]


class GroupJoined(Message, frozen=True):
    """Rollout worker, or the source itself -> controller: in the group, or not."""

    group: str
    error: str = ""


class StageBuckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The buckets of one pipeline stage and the group they come through."""

    group: str
    buckets: list[Bucket]


class UpdateWeights(Message, frozen=True):
    """Controller -> rollout worker: interrupt all requests, stay paused, answer UpdateReady."""

    version: int


class UpdateReady(Message, frozen=True):
    """Rollout worker -> controller: nothing runs any more."""

    version: int
    seconds: dict[str, float]


class SendBuckets(Message, frozen=True):
    """Controller -> weight sources, when every receiver is ready and the groups stand: go."""

    version: int
    verify: bool = True  # work out the digests too


class ReceiveBuckets(Message, frozen=True):
    """Controller -> rollout workers, with SendBuckets: take these buckets in, stage by stage."""

    version: int
    stages: list[StageBuckets]
    verify: bool
    flattened: bool = True  # a bucket is one broadcast; else each of its tensors is one


class BucketsSent(Message, frozen=True):
    """Weight source -> controller: done; what each tensor must digest to, in the engine's fused names."""

    version: int
    stage: int
    digests: dict[str, str]
    seconds: dict[str, float]
    error: str = ""
    peak_bytes: int = 0  # GPU memory that the update took beside the model; 0 on a CPU


class WeightDigests(Message, frozen=True):
    """Controller -> rollout worker: all stages' digests; compare, then resume."""

    version: int
    digests: dict[str, str]


class AbandonUpdate(Message, frozen=True):
    """Controller -> rollout workers: a source failed, so this try is void. Who still waits for digests answers
    UpdateReady and stays paused; the others have failed themselves."""

    version: int


class WriteSnapshot(Message, frozen=True):
    """Controller -> weight sources: write your tensors of `version` as files into this folder. Answered by FolderWritten."""

    version: int
    folder: str
    part: int  # number of the source, for the files' names


class SnapshotWritten(Message, frozen=True):
    """Weight source -> controller: the files are on disk, or why not; and what each tensor must digest to in the engine."""

    version: int
    files: list[FileEntry]
    digests: dict[str, str]
    digest_kind: str
    seconds: dict[str, float]
    error: str = ""


class Relabel(Message, frozen=True):
    """Controller -> rollout worker, with run.mode = rollout_only: what the engine holds counts as `version` from now on.
    Answered by Updated."""

    version: int


class LoadSnapshot(Message, frozen=True):
    """Controller -> rollout worker: verify the folder (snapshots.py), interrupt all requests, have the engine load it,
    compare digests, resume. Answered by Updated."""

    version: int
    folder: str


class Updated(Message, frozen=True):
    """Rollout worker -> controller: serving `version` with digests that match, or why not."""

    version: int
    seconds: dict[str, float]
    error: str = ""
    num_interrupted: int = 0  # requests that the update stopped; they go on under the new weights


class Published(Message, frozen=True):
    """Controller -> weight sources: the update is over, whoever took part."""

    version: int
    num_serving: int


AnyMessage = Union[
    Hello, Welcome, Refused, RejoinRequest, Heartbeat, Shutdown, Failed,
    Generate, Generated, PartialSample, GenerateFailed, ScoreRequest, ScoreResult,
    GetBatch, TrainBatch, Republish, CheckpointSaved, StepDone,
    PublishOffer, OpenGroup, GroupOpened, JoinGroup, GroupJoined,
    UpdateWeights, UpdateReady, SendBuckets, ReceiveBuckets, BucketsSent, WeightDigests, AbandonUpdate, Updated, Published,
    WriteSnapshot, SnapshotWritten, LoadSnapshot, Relabel,
]  # fmt: skip
