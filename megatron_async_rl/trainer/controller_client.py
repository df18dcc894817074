"""The trainer's way to the controller: leaders hold a socket, the ranks of their replica hear from them.

A leader is the first rank of each data-parallel replica (all its tensor, context and pipeline ranks): it fetches the
replica's share of a batch and passes the very bytes on. From a weight source weights leave (weights/reshard.py): the
first rank of each pipeline stage, and the first of those that hold the same experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol.messages import (
    AnyMessage,
    CheckpointSaved,
    GetBatch,
    Hello,
    Republish,
    Shutdown,
    StepDone,
    TrainBatch,
)
from megatron_async_rl.protocol.transport import SyncLink
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.protocol.wire import Codec
from megatron_async_rl.weights.reshard import is_source

LISTEN_S = (
    5.0  # a leader that waits tells its replica so this often: waiting is not a stuck collective
)


class ControllerLink:
    def __init__(self, config: Config, run_dir: Path) -> None:
        self._codec = Codec()
        self._group, self._root = _replica_group()
        replica, stage = mpu.get_data_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
        self.is_leader = dist.get_rank() == self._root
        self.is_source = is_source()
        self.socket: SyncLink | None = None
        if self.is_leader or self.is_source:
            self.socket = SyncLink(run_dir, config.trainer.start_timeout_s)
            self.socket.join(
                Hello(
                    "trainer",
                    f"trainer-{dist.get_rank()}",
                    os.getpid(),
                    leader=replica if self.is_leader else -1,
                    stage=stage if self.is_source else -1,
                    tokenizer=fingerprint(config.model.path),
                )
            )

    def next_batch(
        self, version: int, republish: Callable[[int], object]
    ) -> list[TrainSample] | None:
        """This replica's share of the batch to train on `version`; None when the run is over. All ranks call.

        `republish` is called meanwhile when a server has come that needs the weights as they are.
        """
        if self.is_leader and self.socket:
            self.socket.send(GetBatch(version))
        while True:
            message = self._share(self._listen() if self.is_leader else None)
            if isinstance(message, Republish):
                republish(version)
            elif message is not None and not (
                isinstance(message, TrainBatch) and message.version < version
            ):
                break  # an older batch is one asked for twice, when the controller began a new life
        if isinstance(message, Shutdown):
            return None
        if not isinstance(message, TrainBatch) or message.version != version:
            raise ProtocolError(
                f"expected the batch of version {version} from the controller, got {type(message).__name__}"
            )
        return message.samples

    def report(self, version: int, stats: dict[str, float]) -> None:
        """The weights are now `version`. Rank 0 speaks for all."""
        if dist.get_rank() == 0 and self.socket:
            self.socket.send(StepDone(version, stats))

    def saved(self, version: int, folder: str) -> None:
        """The files of this checkpoint are whole. Rank 0 speaks for all."""
        if self.socket:
            self.socket.send(CheckpointSaved(version, folder))

    def close(self) -> None:
        if self.socket:
            self.socket.close()

    def _listen(self) -> AnyMessage | None:
        assert self.socket
        if self.socket.ended:
            return self.socket.ended  # heard while publishing
        try:
            return self.socket.receive(LISTEN_S)
        except TimeoutError:
            return None

    def _share(self, message: AnyMessage | None) -> AnyMessage | None:
        """The leader's message on every rank of its replica; None: still waiting."""
        if self._group.size() == 1:
            return message
        frames = self._codec.encode(message) if self.is_leader and message is not None else []
        # [number of frames, bytes of each frame, ...] in a tensor of fixed size would bound the frames: two broadcasts
        count = self._broadcast(np.asarray([len(frames)], np.int64))
        if not count[0]:
            return None
        sizes = self._broadcast(
            np.asarray([len(f) for f in frames] or np.zeros(count[0]), np.int64)
        )
        data = (
            np.concatenate([np.frombuffer(f, np.uint8) for f in frames if len(f)])
            if frames
            else None
        )
        payload = self._broadcast(
            data if data is not None else np.empty(int(sizes.sum()), np.uint8)
        )
        if message is not None:
            return message
        ends = np.cumsum(sizes)
        return self._codec.decode(
            [payload[end - size : end].data for size, end in zip(sizes, ends, strict=True)]
        )

    def _broadcast(self, array: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.array(array))
        dist.broadcast(tensor, src=self._root, group=self._group)
        return tensor.numpy()


def _replica_group() -> tuple[dist.ProcessGroup, int]:
    """A gloo group over this rank's replica, whatever the trainer's own backend, and its first rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    replicas = [
        torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())
    ]
    own = mpu.get_data_parallel_rank()
    dist.all_gather(replicas, torch.tensor([own], device=device))
    groups = []
    for replica in range(
        mpu.get_data_parallel_world_size()
    ):  # every rank makes every group, in one order
        members = [rank for rank, other in enumerate(replicas) if int(other) == replica]
        groups.append((dist.new_group(members, backend="gloo"), members[0]))
    return groups[own]
