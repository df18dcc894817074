"""The trainer's end of a weight update (controller/publisher.py draws the whole exchange).

All tensor-parallel ranks of replica 0, and the ranks that hold other experts, take part in gathering. The first of a
pipeline stage is a weight source, and so is the first of those that hold the same experts: each speaks with the
controller and sends what is its own; the stage's first tells the ranks that are no sources what it was told. Other
replicas (and context-parallel ranks) have the same weights and go on. A failure on the wire never stops the gather half-way: the
ranks stay in step and the trainer stays alive.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import PublishError
from megatron_async_rl.model.families import ModelShape
from megatron_async_rl.protocol.messages import (
    BucketsSent,
    GroupJoined,
    GroupOpened,
    OpenGroup,
    Published,
    PublishOffer,
    SendBuckets,
    Shutdown,
    SnapshotWritten,
    WriteSnapshot,
)
from megatron_async_rl.protocol.transport import SyncLink
from megatron_async_rl.storage.snapshots import digest_kind
from megatron_async_rl.weights.bucket import fill_buckets, plan_buckets, split_bucket
from megatron_async_rl.weights.digest import EngineDigests
from megatron_async_rl.weights.disk import FolderWriter
from megatron_async_rl.weights.parameters import Modules, chunks
from megatron_async_rl.weights.reshard import (
    hf_tensors,
    is_first_of_stage,
    is_source,
    num_expert_owners,
    own_manifest,
    own_tensors,
    source_number,
    takes_part,
)
from megatron_async_rl.weights.stopwatch import Stopwatch
from megatron_async_rl.weights.update_group import UpdateGroup

logger = logging.getLogger(__name__)
DTYPES = {
    "as_trained": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SEND, _DONE, _WAIT, _SEND_AND_DIGEST = 1, 2, 3, 4
WIRE_SHARE = 0.5  # of the update's deadline: the controller must hear of a broken wire before its own has passed
WAIT_S = 5.0  # the source tells its tensor-parallel ranks so often that it still waits


class WeightPublisher:
    """Publishes what leaves from this rank. `socket` is a source's; None on every other rank."""

    def __init__(
        self, modules: Modules, shape: ModelShape, config: Config, socket: SyncLink | None
    ) -> None:
        self._modules = modules
        self._shape = shape
        self._config = config
        self._socket = socket
        self._takes_part = takes_part()
        self._peers = _stage_group(
            takes_part() and (is_first_of_stage() or not is_source()), config
        )
        self._owners = _stage_group(is_source(), config)
        self._device = next(chunks(modules)[0].parameters()).device
        self._dtype = DTYPES[config.weights.dtype]
        self._buckets = plan_buckets(
            own_manifest(modules, shape, self._dtype), config.weights.bucket_bytes
        )
        self._flattened = config.weights.broadcast_unit == "bucket"
        self._digest_kind = digest_kind(config)
        self._group: UpdateGroup | None = None

    def publish(self, version: int) -> bool:
        """Offers the weights as they are now under `version` and sends them when told. False: the run is over.

        Raises PublishError when the controller has not ended the update within twice its own deadline.
        """
        if not self._takes_part:
            return True
        if self._socket is None:
            return self._follow()
        self._socket.send(
            PublishOffer(
                version,
                source_number(),
                mpu.get_pipeline_model_parallel_world_size() * num_expert_owners(),
                self._buckets,
                "nccl" if self._device.type == "cuda" else "gloo",
                self._flattened,
            )
        )
        return self._lead(version, self._socket)

    def _lead(self, version: int, socket: SyncLink) -> bool:
        # generous: before version 0 the controller waits for all workers, at other times its own deadlines hold
        patience_s = (
            self._config.rollout.start_timeout_s + 4 * self._config.weights.update_timeout_s
        )
        deadline = time.monotonic() + patience_s
        while True:
            try:
                message = socket.receive(WAIT_S)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise PublishError(
                        f"the controller neither took nor refused version {version} within {patience_s:.0f} s"
                    ) from None
                self._tell(_WAIT)
                continue
            if isinstance(message, OpenGroup):
                self._open(message, socket)
            elif isinstance(message, SendBuckets):
                self._tell(_SEND_AND_DIGEST if message.verify else _SEND)
                socket.send(self._transfer(version, message.verify))
            elif isinstance(message, WriteSnapshot):
                self._tell(_SEND_AND_DIGEST)
                socket.send(self._write_folder(message))
            elif isinstance(message, Published):
                self._tell(_DONE)
                return True
            elif isinstance(message, Shutdown):
                self._tell(_DONE)
                return False

    def _follow(self) -> bool:
        while (told := self._tell(0)) != _DONE:
            if told in (_SEND, _SEND_AND_DIGEST):
                for _ in own_tensors(self._modules, self._shape, self._dtype):
                    pass
            if told == _SEND_AND_DIGEST:
                self._experts_digests(self._new_digests())
        return True

    def _tell(self, command: int) -> int:
        """The word of the stage's first source to the ranks that gather and are no sources; the others have their own."""
        if self._peers is None or self._peers.size() == 1:
            return command
        tensor = torch.tensor([command])
        dist.broadcast(tensor, group=self._peers, group_src=0)
        return int(tensor)

    def _open(self, order: OpenGroup, socket: SyncLink) -> None:
        if self._group is not None:
            self._group.close()
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        timeout_s = WIRE_SHARE * self._config.weights.update_timeout_s
        self._group = UpdateGroup(
            order.group, order.world_size, backend, socket.own_address, timeout_s
        )
        stage = mpu.get_pipeline_model_parallel_rank()
        socket.send(GroupOpened(order.group, stage, self._group.address, self._group.port))
        error = ""
        try:
            self._group.join()
        except RuntimeError as e:
            error = f"update group {order.group}: {e}"
            logger.error("%s", error)
        socket.send(GroupJoined(order.group, error))

    def _new_digests(self) -> EngineDigests:
        tp = self._config.engine_tp
        return EngineDigests(self._shape, tp, self._digest_kind, num_expert_owners())

    def _experts_digests(self, digests: EngineDigests) -> dict[str, str]:
        """All digests of this source, those of experts that several own with the stage's first. Collective over the stage."""
        if num_expert_owners() == 1:
            return digests.result()
        element_bytes = (self._dtype or next(chunks(self._modules)[0].parameters()).dtype).itemsize
        if digests.can_sum_experts(element_bytes):
            if self._owners is not None:
                totals = digests.expert_sums()
                dist.all_reduce(totals, group=self._owners)
                if is_first_of_stage():
                    digests.set_expert_sums(totals)
            return digests.result()
        whole = EngineDigests(self._shape, digests.engine_tp, self._digest_kind)
        for name, tensor in hf_tensors(self._modules, self._shape, self._dtype, only_experts=True):
            if is_first_of_stage():
                whole.add(name, tensor)
        return digests.result() | whole.result()

    def _write_folder(self, order: WriteSnapshot) -> SnapshotWritten:
        writer, digests = FolderWriter(Path(order.folder), order.part), self._new_digests()
        writer.write(
            self._buckets,
            own_tensors(self._modules, self._shape, self._dtype),
            self._device,
            digests,
        )
        expected = self._experts_digests(digests)
        if writer.error:
            logger.error("%s", writer.error)
            return SnapshotWritten(order.version, [], {}, self._digest_kind, {}, writer.error)
        return SnapshotWritten(
            order.version, writer.files, expected, self._digest_kind, writer.seconds
        )

    def _transfer(self, version: int, verify: bool) -> BucketsSent:
        """Gathers bucket k+1 while bucket k is on the wire; on a wire error the gather still runs to its end."""
        group = self._group
        assert group is not None
        digests = self._new_digests()
        watch = Stopwatch(self._device)
        error = ""
        tensors = own_tensors(self._modules, self._shape, self._dtype)
        filled = fill_buckets(self._buckets, tensors, self._device)
        for bucket in self._buckets:
            with watch("gather"):
                _, flat = next(filled)
            tensors_of = dict(split_bucket(bucket, flat))
            pieces = [flat] if self._flattened else list(tensors_of.values())
            try:
                for piece in pieces if not error else ():
                    group.broadcast(piece)
            except RuntimeError as e:
                error = f"broadcast of version {version}: {e}"
            if verify:  # whatever became of the wire: other sources add theirs to it
                with watch("trainer_digest"):
                    for name, tensor in tensors_of.items():
                        digests.add(name, tensor)
            try:
                if not error:
                    group.wait(keep=len(pieces))  # the buffer of the bucket before is filled next
            except RuntimeError as e:
                error = f"broadcast of version {version}: {e}"
        for _ in tensors:  # nothing is left, but the other ranks' gather ends only with this one
            pass
        if not error:
            try:
                group.finish()
            except RuntimeError as e:
                error = f"broadcast of version {version}: {e}"
        if error:
            logger.error("%s", error)
            group.abort()
        expected = self._experts_digests(digests) if verify else {}
        return BucketsSent(
            version,
            mpu.get_pipeline_model_parallel_rank(),
            {} if error else expected,
            watch.seconds() | {"wire": watch.elapsed()},
            error,
            watch.peak_bytes(),
        )


def _stage_group(is_member: bool, config: Config) -> dist.ProcessGroup | None:
    """A gloo group of this stage's members, whatever the trainer's own backend; None for who is not one of them."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = mpu.get_pipeline_model_parallel_rank() if is_member else -1
    stages = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(stages, torch.tensor([mine], device=device))
    timeout = timedelta(seconds=config.trainer.collective_timeout_s)
    groups = []
    for stage in range(
        mpu.get_pipeline_model_parallel_world_size()
    ):  # every rank makes every group, in one order
        members = [rank for rank, its_stage in enumerate(stages) if int(its_stage) == stage]
        groups.append(dist.new_group(members, timeout, "gloo"))
    return groups[mine] if is_member else None
