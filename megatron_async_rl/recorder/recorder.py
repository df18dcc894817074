"""To the controller a trainer of one rank whose steps change nothing: run.mode = rollout_only.

It asks for batches, writes each as a file that `replay` trains on, reports the step, and offers the weights under the next
version, which servers take in as a new name for what they hold (controller/relabel.py). So ledger, staleness, admission
and recovery are those of training, by the same code: a version is a batch.

The newest file is asked for again at a start: its step may not have been reported.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.tokenizer import fingerprint
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol.messages import (
    AnyMessage,
    GetBatch,
    Hello,
    Published,
    PublishOffer,
    Republish,
    Shutdown,
    StepDone,
    TrainBatch,
)
from megatron_async_rl.protocol.transport import SyncLink
from megatron_async_rl.protocol.types import NOT_GENERATED
from megatron_async_rl.storage import batches

logger = logging.getLogger(__name__)
FOLDER = "batches"  # in run.dir
LISTEN_S = 5.0  # the controller hears from us so often


class Recorder:
    def __init__(self, config: Config, run_dir: Path) -> None:
        self._steps = config.run.steps
        self._folder = run_dir / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._link = SyncLink(run_dir, config.trainer.start_timeout_s)
        tokenizer = fingerprint(config.model.path)
        self._link.join(
            Hello("trainer", "trainer-0", os.getpid(), leader=0, stage=0, tokenizer=tokenizer)
        )

    def run(self) -> None:
        """Until all batches are written, or the controller ends the run."""
        version = self._newest()
        running = self._offer(version)
        while running and version < self._steps:
            batch = self._batch(version)
            if batch is None:
                break
            self._write(batch)
            version += 1
            running = self._offer(version)
        self._link.close()

    def _newest(self) -> int:
        """The version of the newest file; 0 where there is none."""
        return max(
            (int(path.stem.removeprefix("v")) for path in self._folder.glob("v*.npz")), default=0
        )

    def _batch(self, version: int) -> TrainBatch | None:
        self._link.send(GetBatch(version))
        while True:
            message = self._receive()
            if isinstance(message, Shutdown) or (
                isinstance(message, Republish) and not self._offer(version)
            ):
                return None
            if isinstance(message, TrainBatch):
                if message.version == version:
                    return message
                if message.version > version:
                    raise ProtocolError(
                        f"expected the batch of version {version}, got that of {message.version}"
                    )

    def _write(self, batch: TrainBatch) -> None:
        started = time.monotonic()
        path = self._folder / f"v{batch.version:06d}.npz"
        batches.save(path, batch.version, batch.samples)
        tokens = sum(int((sample.versions != NOT_GENERATED).sum()) for sample in batch.samples)
        seconds = time.monotonic() - started
        logger.info(
            "%s: %d samples, %d tokens, %.2f s", path.name, len(batch.samples), tokens, seconds
        )
        self._link.send(
            StepDone(batch.version + 1, {"batch/tokens": tokens, "perf/time/write_s": seconds})
        )

    def _offer(self, version: int) -> bool:
        """The servers hold `version`; False: the run is over."""
        self._link.send(PublishOffer(version, 0, 1, [], "gloo"))
        while not isinstance(message := self._receive(), Published):
            if isinstance(message, Shutdown):
                return False
        return True

    def _receive(self) -> AnyMessage:
        """Waits as long as it takes: the controller has the deadlines, and tells us when the run is over."""
        if self._link.ended:
            return self._link.ended
        while True:
            try:
                return self._link.receive(LISTEN_S)
            except TimeoutError:
                continue
