"""Messages of a weight update: sender, receiver, and the message that answers each.

controller/weight_sync/broadcast.py and snapshot.py draw their order.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.types import FileEntry

Backend = Literal["nccl", "gloo"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a bucket, with its Hugging Face name and shape."""

    name: str
    dtype: str  # torch's name without the prefix: float32, bfloat16, float16, float8_e4m3fn
    shape: list[int]


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that are sent as one flattened broadcast, in this order."""

    tensors: list[TensorSpec]


class PublishOffer(Message, frozen=True):
    """Weight source -> controller: `version` can be sent. The update ends with Published."""

    version: int
    source: int  # servers receive from one source after another, in this order
    num_sources: int
    buckets: list[Bucket]
    backend: Backend
    flattened: bool = True


class OpenGroup(Message, frozen=True):
    """Controller -> weight source: open an update group. Answered by GroupOpened at once; then the
    source waits for the engines to join."""

    group: str
    world_size: int


class GroupOpened(Message, frozen=True):
    """Weight source -> controller: where the group's store listens."""

    group: str
    stage: int
    address: str
    port: int


class JoinGroup(Message, frozen=True):
    """Controller -> rollout worker: join the update group of a source. Answered by GroupJoined."""

    group: str
    address: str
    port: int
    rank_offset: int
    world_size: int
    backend: Backend


class GroupJoined(Message, frozen=True):
    """Rollout worker, or the source itself -> controller: joined, or failed with `error`."""

    group: str
    error: str = ""


class StageBuckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The buckets of one source, and the group that they are sent in."""

    group: str
    buckets: list[Bucket]


class UpdateWeights(Message, frozen=True):
    """Controller -> rollout worker: interrupt all requests and stay paused. Answered by
    UpdateReady."""

    version: int


class UpdateReady(Message, frozen=True):
    """Rollout worker -> controller: no request is running."""

    version: int
    seconds: dict[str, float]


class SendBuckets(Message, frozen=True):
    """Controller -> weight sources, when all receivers are ready: broadcast. Answered by
    BucketsSent."""

    version: int
    verify: bool = True  # compute the digests too


class ReceiveBuckets(Message, frozen=True):
    """Controller -> rollout workers, with SendBuckets: load these buckets, source by source."""

    version: int
    stages: list[StageBuckets]
    verify: bool
    flattened: bool = True  # a bucket is one broadcast; otherwise each of its tensors is one


class BucketsSent(Message, frozen=True):
    """Weight source -> controller: done, with the expected digest of each tensor in the engine."""

    version: int
    stage: int
    digests: dict[str, str]  # by the engine's fused names
    seconds: dict[str, float]
    error: str = ""
    peak_bytes: int = 0  # GPU memory that the update took besides the model; 0 on a CPU


class WeightDigests(Message, frozen=True):
    """Controller -> rollout worker: the digests of all sources; compare, then resume. Answered by
    Updated."""

    version: int
    digests: dict[str, str]


class AbandonUpdate(Message, frozen=True):
    """Controller -> rollout workers and weight sources: one of them failed, so this attempt is
    void. Answered by UpdateReady from workers that wait for digests, which stay paused; a source
    that is sending stops and answers BucketsSent with an error."""

    version: int


class WriteSnapshot(Message, frozen=True):
    """Controller -> weight sources: write the tensors of `version` as files into this folder.
    Answered by SnapshotWritten."""

    version: int
    folder: str
    part: int  # number of the source, for the file names


class SnapshotWritten(Message, frozen=True):
    """Weight source -> controller: the files are on disk, or failed with `error`."""

    version: int
    files: list[FileEntry]
    digests: dict[str, str]  # expected of each tensor in the engine
    digest_kind: str
    seconds: dict[str, float]
    error: str = ""


class Relabel(Message, frozen=True):
    """Controller -> rollout worker, in run.mode = rollout_only: the weights that it has count as
    `version` from now on. Answered by Updated."""

    version: int


class LoadSnapshot(Message, frozen=True):
    """Controller -> rollout worker: verify the snapshot, interrupt all requests, load it, compare
    digests, resume. Answered by Updated."""

    version: int
    folder: str


class Updated(Message, frozen=True):
    """Rollout worker -> controller: serves `version` with verified digests, or failed."""

    version: int
    seconds: dict[str, float]
    error: str = ""
    num_interrupted: int = 0  # requests that the update interrupted; they resume on the new weights


class Published(Message, frozen=True):
    """Controller -> weight sources: the update is over."""

    version: int
    num_serving: int


WeightMessage = (
    PublishOffer | OpenGroup | GroupOpened | JoinGroup | GroupJoined
    | UpdateWeights | UpdateReady | SendBuckets | ReceiveBuckets | BucketsSent
    | WeightDigests | AbandonUpdate | Updated | Published
    | WriteSnapshot | SnapshotWritten | LoadSnapshot | Relabel
)  # fmt: skip
