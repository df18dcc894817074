"""The trainer ranks' connection to the controller.

The leader of a data-parallel replica (its first rank) fetches the replica's share of each batch and
broadcasts the received bytes to the replica's other ranks: all its tensor, context and pipeline
ranks train on the same samples. Leaders agree on whether to train (protocol/leader.py). Weight
sources (weights/reshard.py) also have a connection, over which they take part in weight updates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.leader import Leader
from megatron_async_rl.protocol.sync_link import SyncLink, is_finished
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.protocol.wire import AnyMessage, Codec
from megatron_async_rl.trainer.parallel import device
from megatron_async_rl.weights.parameters import gloo_group
from megatron_async_rl.weights.reshard import is_source


class ControllerClient:
    """Joins the controller as leader or weight source; other ranks only follow their leader."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._codec = Codec()
        replicas = mpu.get_data_parallel_world_size()
        self._group = gloo_group(mpu.get_data_parallel_rank(), replicas)
        self._is_leader = self._group.rank() == 0
        self._leaders = gloo_group(0, 1, self._is_leader)
        self._is_source = is_source()
        self._socket: SyncLink | None = None
        self._leader: Leader | None = None
        found = torch.tensor([int(is_finished(run_dir, config.run.steps))], device=device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self.run_is_over = bool(found)  # and its controller has ended
        if (self._is_leader or self._is_source) and not self.run_is_over:
            stage = mpu.get_pipeline_model_parallel_rank()
            self._socket = SyncLink(run_dir, config.trainer.start_timeout_s)
            self._socket.join(
                messages.Hello(
                    "trainer",
                    f"trainer-{dist.get_rank()}",
                    os.getpid(),
                    leader=mpu.get_data_parallel_rank() if self._is_leader else -1,
                    stage=stage if self._is_source else -1,
                    tokenizer=fingerprint(config.model.path),
                )
            )
            if self._is_leader:
                self._leader = Leader(self._socket, self._is_any_leader)

    @property
    def source_socket(self) -> SyncLink | None:
        """The connection for weight updates; None unless this rank is a weight source."""
        return self._socket if self._is_source else None

    def next_batch(
        self, version: int, republish: Callable[[int], object]
    ) -> list[TrainSample] | None:
        """Returns this replica's share of the batch to train on `version`; None at the run's end.

        Collective over the replica. Waits; meanwhile calls `republish(version)` when a new server
        needs the current weights. Raises ProtocolError.
        """
        if self.run_is_over:
            return None
        if self._leader:
            self._leader.request(version)
        while True:
            answer = self._leader.receive(version) if self._leader else None
            if self._socket and not self._leader:
                self._socket.keep_joined()
            match self._broadcast_message(answer):
                case messages.Republish():
                    republish(version)
                case messages.TrainBatch(samples=samples):
                    return samples
                case messages.Shutdown():
                    return None

    def report_step(
        self, version: int, metrics: dict[str, float], probe_logprobs: np.ndarray
    ) -> None:
        """Reports that the weights are now `version`; sent by rank 0 only."""
        if dist.get_rank() == 0 and self._socket:
            self._socket.send(messages.StepDone(version, metrics, probe_logprobs))

    def report_checkpoint(self, version: int, folder: str) -> None:
        """Reports that all files of a checkpoint are complete; call it on rank 0 only."""
        if self._socket:
            self._socket.send(messages.CheckpointSaved(version, folder))

    def await_commit(self) -> None:
        """Waits until the last checkpoint is committed, or the controller has ended."""
        if dist.get_rank() == 0 and self._socket:
            self._socket.await_commit()

    def close(self) -> None:
        """Closes the connection."""
        if self._socket:
            self._socket.close()

    def _is_any_leader(self, flag: bool) -> bool:
        assert self._leaders is not None
        if self._leaders.size() == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._leaders)
        return bool(found)

    def _broadcast_message(self, message: AnyMessage | None) -> AnyMessage | None:
        """Returns the leader's message on every rank of its replica; None: still waiting."""
        if self._group.size() == 1:
            return message
        frames = [] if message is None else self._codec.encode(message)
        # a bytearray: torch wants memory that it could write to
        data = torch.frombuffer(bytearray(msgspec.msgpack.encode(frames)), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, group=self._group, group_src=0)
        if not self._is_leader:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group=self._group, group_src=0)
        if self._is_leader:
            return message
        frames = msgspec.msgpack.decode(data.numpy(), type=list[memoryview])
        return self._codec.decode(frames) if frames else None
