"""What crosses a process border, who sends it to whom, and what answers it.

On the wire a message is a msgpack header and one raw frame per array; nothing is ever pickled. Everything goes through
the controller (a star), so "worker" below means the peer at the other end of the controller's one socket.

`epoch` is the controller's life, `attempt` counts the leases of one group. A reply that carries an old one changes a
counter and nothing else (fencing).
"""

from __future__ import annotations

from typing import Any, Literal, Union

import msgspec
import numpy as np

from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.snapshots import FileEntry
from megatron_async_rl.types import Partial, Prompt, Purpose, Sample, TrainSample

PROTOCOL = 1
Role = Literal["rollout", "reward", "trainer"]
Frame = bytes | memoryview
_DTYPES = {"<i4": np.dtype("<i4"), "<f4": np.dtype("<f4")}  # the only element types that travel


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag on the wire is the class name."""


# ---- joining and leaving


class Hello(Message, frozen=True):
    """Worker -> controller, first of all. Answered by Welcome or Refused."""

    role: Role
    name: str
    pid: int
    protocol: int = PROTOCOL
    leader: int = -1  # trainer: data-parallel rank whose share this rank fetches; -1: none
    capacity: int = 0  # rollout: samples in flight at most; reward: verdicts at once
    stage: int = -1  # trainer: pipeline stage whose weights this rank sends; -1: none
    serving: int = -1  # rollout: version that its server holds, verified, with the gate open; -1: none


class Welcome(Message, frozen=True):
    """Controller -> worker."""

    epoch: int


class Refused(Message, frozen=True):
    """Controller -> worker, which then ends with this reason."""

    reason: str


class SayHello(Message, frozen=True):
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
    floor_version: int = 0  # what the worker itself has left of these samples counts unless it is older


class Generated(Message, frozen=True):
    """Rollout worker -> controller."""

    epoch: int
    group_id: int
    attempt: int
    index: int
    sample: Sample


class PartialSample(Message, frozen=True):
    """Rollout worker -> controller: what a sample has at an interruption, for whoever goes on with it after a crash."""

    epoch: int
    group_id: int
    attempt: int
    index: int
    partial: Partial


class GenerateFailed(Message, frozen=True):
    """Rollout worker -> controller: this sample cannot be had from this worker."""

    epoch: int
    group_id: int
    attempt: int
    index: int
    error: str


# ---- reward


class Score(Message, frozen=True):
    """Controller -> reward worker. Answered by Scored."""

    epoch: int
    group_id: int
    attempt: int
    index: int
    response: str
    row: dict[str, Any]


class Scored(Message, frozen=True):
    """Reward worker -> controller: a verdict, or an infrastructure error, which is never a reward."""

    epoch: int
    group_id: int
    attempt: int
    index: int
    reward: float | None
    error: str = ""
    seconds: float = 0.0


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


class WriteFolder(Message, frozen=True):
    """Controller -> weight sources: write your tensors of `version` as files into this folder. Answered by FolderWritten."""

    version: int
    folder: str
    part: int  # number of the source, for the files' names


class FolderWritten(Message, frozen=True):
    """Weight source -> controller: the files are on disk, or why not; and what each tensor must digest to in the engine."""

    version: int
    files: list[FileEntry]
    digests: dict[str, str]
    digest_kind: str
    seconds: dict[str, float]
    error: str = ""


class LoadFolder(Message, frozen=True):
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
    Hello, Welcome, Refused, SayHello, Heartbeat, Shutdown, Failed,
    Generate, Generated, PartialSample, GenerateFailed, Score, Scored,
    GetBatch, TrainBatch, Republish, CheckpointSaved, StepDone,
    PublishOffer, OpenGroup, GroupOpened, JoinGroup, GroupJoined,
    UpdateWeights, UpdateReady, SendBuckets, ReceiveBuckets, BucketsSent, WeightDigests, AbandonUpdate, Updated, Published,
    WriteFolder, FolderWritten, LoadFolder,
]  # fmt: skip


class Codec:
    """Messages (or another tagged union of structs) to frames and back. Not for use from two threads at once."""

    def __init__(self, kind: Any = AnyMessage) -> None:
        self._frames: list[Frame] = []
        self._num_read = 0
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._put_array)
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=self._get_array)

    def encode(self, message: msgspec.Struct) -> list[Frame]:
        """Frames: msgpack header | one raw frame per array, in the order in which the header names them."""
        self._frames = []
        try:
            header = self._encoder.encode(message)
        except (UnicodeEncodeError, OverflowError) as e:
            raise ProtocolError(f"a {type(message).__name__} holds what cannot travel: {e}") from None
        return [header, *self._frames]

    def decode(self, frames: list[Frame]) -> Any:
        """The message; its arrays are read-only views of the frames. Raises ProtocolError on anything malformed."""
        self._frames, self._num_read = frames[1:], 0
        try:
            message = self._decoder.decode(frames[0])
            if self._num_read != len(frames) - 1:
                raise ValueError(f"the header names {self._num_read} arrays")
        except (msgspec.DecodeError, IndexError, ValueError, TypeError, RecursionError) as e:
            raise ProtocolError(f"malformed message of {len(frames)} frames: {e}") from None
        finally:
            self._frames = []
        return message

    def _put_array(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES or value.ndim != 1:
            raise ProtocolError(
                f"{type(value).__name__} {getattr(value, 'dtype', '')} does not travel; 1-D int32/float32 do"
            )
        self._frames.append(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
        return (value.dtype.str, len(self._frames) - 1)

    def _get_array(self, kind: type, value: Any) -> Any:
        if kind is not np.ndarray:
            raise ProtocolError(f"no decoder for {kind}")
        dtype, index = value
        if dtype not in _DTYPES or index != self._num_read:
            raise ValueError(f"array of type {dtype!r} in frame {index}, expected frame {self._num_read}")
        self._num_read += 1
        frame = self._frames[index]
        return np.frombuffer(frame, _DTYPES[dtype]) if len(frame) else np.empty(0, _DTYPES[dtype])
