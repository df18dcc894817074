"""The trainer's side of a weight update (controller/weight_sync/ has the message exchange).

All tensor-parallel ranks of replica 0, and the ranks that hold other experts, take part in
gathering. The first rank of a pipeline stage is a weight source, and so is the first rank of each
other expert-parallel rank's holders. A source talks to the controller and sends its own tensors;
the stage's first source passes the controller's commands on to the ranks that only gather. Other
replicas and context-parallel ranks hold the same weights and continue at once.

A failed broadcast never interrupts a gather: the ranks stay in step and the trainer keeps running.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.model.shape import ModelShape
from megatron_async_rl.protocol import weight_messages
from megatron_async_rl.protocol.orders import Command, carry_out_orders, stopped_by_order
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.storage.snapshots import digest_kind
from megatron_async_rl.weights import reshard
from megatron_async_rl.weights.bucket import fill_buckets, plan_buckets, split_bucket
from megatron_async_rl.weights.digest import EngineDigests
from megatron_async_rl.weights.disk import SnapshotWriter
from megatron_async_rl.weights.parameters import Modules, gloo_group
from megatron_async_rl.weights.quantization import FP8, Quantizer, quantized_infos
from megatron_async_rl.weights.stopwatch import Stopwatch
from megatron_async_rl.weights.update_group import UpdateGroup

logger = logging.getLogger(__name__)
# A broken broadcast must be reported before the controller's own deadline of the update expires.
BROADCAST_SHARE = 0.5  # of weights.update_timeout_s


class WeightPublisher:
    """Sends this rank's part of the weights. `link`: a weight source's; None on other ranks."""

    def __init__(
        self, modules: Modules, shape: ModelShape, config: Config, link: SyncLink | None
    ) -> None:
        self._modules = modules
        self._shape = shape
        self._config = config
        self._link = link
        self._takes_part = reshard.takes_part()
        is_first, is_source = reshard.is_first_of_stage(), reshard.is_source()
        stage = mpu.get_pipeline_model_parallel_rank()
        stages = mpu.get_pipeline_model_parallel_world_size()
        timeout = timedelta(seconds=config.trainer.collective_timeout_s)
        is_commanded = self._takes_part and (is_first or not is_source)
        self._command_group = gloo_group(stage, stages, is_commanded, timeout)
        self._source_group = gloo_group(stage, stages, is_source, timeout)
        # a chunk of an interleaved pipeline may have no layers
        parameter = next(parameter for module in modules for parameter in module.parameters())
        self._device = parameter.device
        self._backend = "nccl" if parameter.is_cuda else "gloo"
        sent_as = config.weights.dtype
        self._dtype = None if sent_as == "as_trained" else getattr(torch, sent_as)
        self._element_bytes = (self._dtype or parameter.dtype).itemsize
        infos = reshard.own_tensor_infos(modules, shape, self._dtype)
        self._quantizer: Quantizer | None = None
        if config.sends_fp8:
            self._quantizer, self._element_bytes = Quantizer(), FP8.itemsize
            infos = list(quantized_infos(infos))
        self._buckets = plan_buckets(infos, config.weights.bucket_bytes)
        self._flattened = config.weights.broadcast_unit == "bucket"
        self._digest_kind = digest_kind(config)
        self._group: UpdateGroup | None = None

    def publish(self, version: int) -> bool:
        """Offers the current weights as `version` and sends them on request.

        Returns False if the run is over. Raises PublishError if the controller does not end the
        update in time, or if a weight cannot be quantized.
        """
        if not self._takes_part:
            return True
        if self._link is None:
            return self._follow()
        num_sources = mpu.get_pipeline_model_parallel_world_size() * reshard.num_expert_owners()
        self._link.send(
            weight_messages.PublishOffer(
                version,
                reshard.source_number(),
                num_sources,
                self._buckets,
                self._backend,
                self._flattened,
            )
        )
        # Generous: before version 0 the controller waits for all workers, and later it keeps its
        # own deadlines.
        timeout_s = self._config.rollout.start_timeout_s + 4 * self._config.weights.update_timeout_s
        return carry_out_orders(version, self._link, self, timeout_s)

    def _follow(self) -> bool:
        """Gathers with the sources until the update has ended."""
        while (command := self.broadcast_command(Command.WAIT)) != Command.DONE:
            if command != Command.WAIT:
                for _ in reshard.own_tensors(self._modules, self._shape, self._dtype):
                    pass
            if command == Command.SEND_AND_DIGEST:
                self._all_digests(self._new_digests())
        return True

    def broadcast_command(self, command: Command) -> Command:
        """Returns the first source's command on all ranks that only gather."""
        if self._command_group is None or self._command_group.size() == 1:
            return command
        tensor = torch.tensor([command])
        dist.broadcast(tensor, group=self._command_group, group_src=0)
        return Command(int(tensor))

    def open_group(self, order: weight_messages.OpenGroup) -> None:
        """Opens an update group and waits until the servers have joined, or until a message."""
        assert self._link is not None
        if self._group is not None:
            self._group.close()
        timeout_s = BROADCAST_SHARE * self._config.weights.update_timeout_s
        group = self._group = UpdateGroup(
            order.group, order.world_size, self._backend, self._link.own_address, timeout_s
        )
        stage = mpu.get_pipeline_model_parallel_rank()
        opened = weight_messages.GroupOpened(order.group, stage, group.address, group.port)
        self._link.send(opened)
        error = ""
        try:
            with stopped_by_order(self._link, group.stop):
                group.join()
        except RuntimeError as e:
            error = f"update group {order.group}: {e}"
            logger.error("%s", error)
        self._link.send(weight_messages.GroupJoined(order.group, error))

    def send_buckets(self, order: weight_messages.SendBuckets) -> weight_messages.BucketsSent:
        """Broadcasts all buckets, until a message."""
        assert self._link is not None and self._group is not None
        with stopped_by_order(self._link, self._group.stop):
            return self._send_buckets(order.version, self._group, order.verify)

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that this source sends. Collective, see reshard.own_tensors."""
        tensors = reshard.own_tensors(self._modules, self._shape, self._dtype)
        return self._quantizer(tensors) if self._quantizer else tensors

    def _new_digests(self) -> EngineDigests:
        owners = reshard.num_expert_owners()
        return EngineDigests(self._shape, self._config.engine_tp, self._digest_kind, owners)

    def _all_digests(self, digests: EngineDigests) -> dict[str, str]:
        """Returns this source's digests; the stage's first source adds those of all experts.

        Collective over the ranks of the stage that take part.
        """
        if reshard.num_expert_owners() == 1:
            return digests.result()
        is_first = reshard.is_first_of_stage()
        if digests.can_sum_experts(self._element_bytes):
            if self._source_group is not None:
                parts = digests.expert_parts(mpu.get_expert_model_parallel_rank())
                for part in parts:
                    dist.all_reduce(part, group=self._source_group)
                if is_first:
                    digests.set_expert_parts(*parts)
            return digests.result()
        experts = EngineDigests(self._shape, digests.engine_tp, self._digest_kind)
        tensors = reshard.hf_tensors(self._modules, self._shape, self._dtype, only_experts=True)
        if is_first and self._quantizer:
            tensors = self._quantizer(tensors)
        for name, tensor in tensors:
            if is_first:
                experts.add(name, tensor)
        return digests.result() | experts.result()

    def write_snapshot(
        self, order: weight_messages.WriteSnapshot
    ) -> weight_messages.SnapshotWritten:
        """Writes this source's part, until a message."""
        assert self._link is not None
        writer, digests = SnapshotWriter(Path(order.folder), order.part), self._new_digests()
        with stopped_by_order(self._link, writer.stop):
            writer.write(self._buckets, self._own_tensors(), self._device, digests)
        expected = self._all_digests(digests)
        self._check_weights()
        if writer.error:
            logger.error("%s", writer.error)
            return weight_messages.SnapshotWritten(
                order.version, [], {}, self._digest_kind, {}, writer.error
            )
        return weight_messages.SnapshotWritten(
            order.version, writer.files, expected, self._digest_kind, writer.seconds
        )

    def _send_buckets(
        self, version: int, group: UpdateGroup, verify: bool
    ) -> weight_messages.BucketsSent:
        """Gathers bucket k+1 while bucket k is sent. After an error the gather still completes."""
        digests, watch = self._new_digests(), Stopwatch(self._device)
        tensors = self._own_tensors()
        filled = fill_buckets(self._buckets, tensors, self._device)
        failure: RuntimeError | None = None
        for bucket in self._buckets:
            with watch("gather"):
                _, flat = next(filled)
            tensors_of = dict(split_bucket(bucket, flat))
            pieces = [flat] if self._flattened else list(tensors_of.values())
            try:
                for piece in () if failure else pieces:
                    group.broadcast(piece)
            except RuntimeError as e:
                failure = e
            if verify:  # also after an error: other sources add their experts' sums
                with watch("trainer_digest"):
                    for name, tensor in tensors_of.items():
                        digests.add(name, tensor)
            try:
                if not failure:
                    group.wait(keep=len(pieces))  # the previous bucket's buffer is filled next
            except RuntimeError as e:
                failure = e
        for _ in tensors:  # yields nothing more, but completes the other ranks' gather
            pass
        try:
            if not failure:
                group.finish()
        except RuntimeError as e:
            failure = e
        error = f"broadcast of version {version}: {failure}" if failure else ""
        if failure:
            logger.error("%s", error)
            group.abort()
        expected = self._all_digests(digests) if verify else {}
        self._check_weights()
        return weight_messages.BucketsSent(
            version,
            mpu.get_pipeline_model_parallel_rank(),
            {} if failure else expected,
            watch.seconds() | {"wire": watch.elapsed()},
            error,
            watch.peak_bytes(),
        )

    def _check_weights(self) -> None:
        """Raises PublishError for a weight that fp8 cannot represent; no server resumes on it."""
        if self._quantizer:
            self._quantizer.check()
