"""Replaces the trainer with run.mode = rollout_only: saves each batch and reports the step.

To the controller the recorder is a trainer of one rank. It requests a batch, writes it as a file
for `replay`, reports the step, and offers the unchanged weights as the next version, so that the
servers relabel their weights (controller/weight_sync/). Ledger, staleness, admission and recovery
are therefore those of training: one version per batch.

After a restart the newest batch is requested again, since its step may not have been reported.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megatron_async_rl.config.load import load
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.protocol.types import NOT_GENERATED
from megatron_async_rl.protocol.wire import AnyMessage
from megatron_async_rl.storage import batches

logger = logging.getLogger(__name__)
FOLDER = "batches"  # in run.dir
POLL_S = 5.0  # a waiting recorder sends a heartbeat this often


def run(run_dir: Path) -> None:
    """Writes batches until all are written or the controller ends the run."""
    config = load(run_dir / "config.yaml")
    link = SyncLink(run_dir, config.trainer.start_timeout_s)
    tokenizer = fingerprint(config.model.path)
    link.join(
        messages.Hello("trainer", "trainer-0", os.getpid(), leader=0, stage=0, tokenizer=tokenizer)
    )
    recorder = Recorder(link, run_dir / FOLDER)
    version = recorder.newest_version()
    running = recorder.offer(version)
    while running and version < config.run.steps:
        batch = recorder.request_batch(version)
        if batch is None:
            break
        recorder.record(batch)
        version += 1
        running = recorder.offer(version)
    link.close()


class Recorder:
    def __init__(self, link: SyncLink, folder: Path) -> None:
        self._link = link
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def newest_version(self) -> int:
        """Returns the version of the newest file; 0 if there is none."""
        names = [path.stem for path in self._folder.glob("v*.npz")]
        return max((int(name.removeprefix("v")) for name in names), default=0)

    def request_batch(self, version: int) -> messages.TrainBatch | None:
        """Returns the batch that `version` trains on; None if the run is over."""
        self._link.send(messages.GetBatch(version))
        while True:
            message = self._receive()
            match message:
                case messages.Shutdown():
                    return None
                case messages.Republish():
                    if not self.offer(version):
                        return None
                case messages.TrainBatch() if message.version == version:
                    return message
                case messages.TrainBatch() if message.version > version:
                    raise ProtocolError(
                        f"expected the batch of version {version}, got that of {message.version}"
                    )

    def record(self, batch: messages.TrainBatch) -> None:
        """Writes a batch and reports its step."""
        started = time.monotonic()
        path = self._folder / f"v{batch.version:06d}.npz"
        batches.save(path, batch.version, batch.samples)
        tokens = sum(int((sample.versions != NOT_GENERATED).sum()) for sample in batch.samples)
        seconds = time.monotonic() - started
        logger.info(
            "%s: %d samples, %d tokens, %.2f s", path.name, len(batch.samples), tokens, seconds
        )
        metrics = {"batch/tokens": tokens, "perf/time/write_s": seconds}
        self._link.send(messages.StepDone(batch.version + 1, metrics))

    def offer(self, version: int) -> bool:
        """Lets the servers relabel their weights as `version`; returns False if the run is over."""
        self._link.send(weight_messages.PublishOffer(version, 0, 1, [], "gloo"))
        while True:
            match message := self._receive():
                case messages.Shutdown():
                    return False
                case weight_messages.Published() if message.version >= version:
                    return True  # an earlier one: that version was offered twice

    def _receive(self) -> AnyMessage:
        """Waits without a limit: the controller keeps the deadlines and ends the run."""
        if self._link.ended:
            return self._link.ended
        while True:
            try:
                return self._link.receive(POLL_S)
            except TimeoutError:
                continue
