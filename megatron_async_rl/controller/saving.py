"""The controller's half of a checkpoint: the manifest that ties the trainer's files to the journal,
and the pruning of samples that no kept checkpoint can request again."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.journal import events
from megatron_async_rl.controller.workers import Worker
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.messages import CheckpointCommitted, CheckpointSaved
from megatron_async_rl.storage import checkpoints

logger = logging.getLogger(__name__)


class CheckpointCommitter:
    def __init__(self, context: Context) -> None:
        self._config = context.config
        self._core = context.core
        self._journal = context.journal
        self._workers = context.workers
        self._batches: dict[int, list[int]] = {}  # version -> groups trained on it, until pruned
        self._saved: asyncio.Queue[tuple[Worker, CheckpointSaved, int, int]] = asyncio.Queue()
        self._committed = Peer(), -1  # the last: who reported it, version
        self.newest_saved = asyncio.Event()  # the newest version has a complete checkpoint

    def check_journal(self) -> None:
        """Names damaged manifests; raises DataError if the journal does not match the checkpoints.

        A checkpoint must not be newer than the journal, and one manifest must be intact.
        """
        run_dir = self._config.run_dir
        saved, damaged = checkpoints.list_manifests(run_dir), checkpoints.damaged_manifests(run_dir)
        for path in damaged:
            logger.error("%s is damaged; lost: this checkpoint", path)
        if damaged and not saved:
            raise DataError(
                f"all manifests in {run_dir / checkpoints.FOLDER} are damaged: "
                f"{', '.join(path.name for path in damaged)}; restore one from a copy, or start "
                "over with --from-scratch"
            )
        if saved and saved[0].journal_seq > self._journal.last_seq:
            raise DataError(
                f"checkpoint {saved[0].folder} was written after {saved[0].journal_seq} events, "
                f"but the journal in {self._config.run_dir} has {self._journal.last_seq}: it is an "
                "old copy or belongs to another run; restore the right one, or start over with "
                "--from-scratch"
            )

    def saw(self, event: events.JournalEvent) -> None:
        """Notes which samples to keep: those of a batch, for a trainer that restarts."""
        if isinstance(event, events.BatchSelected):
            self._batches[event.version] = event.group_ids
        elif isinstance(event, events.GroupDropped):
            self._journal.prune([event.group_id])
        elif isinstance(event, events.BatchTrained) and not self._config.has_trainer:
            self._prune_before(event.version - 1)  # a restarted recorder requests the newest again

    def checkpoint_saved(self, name: str, saved: CheckpointSaved) -> None:
        """Makes `run` commit the checkpoint with the events so far, and answer the worker."""
        admitted = self._core.state.ledger.admitted
        self._saved.put_nowait((self._workers[name], saved, self._journal.last_seq, admitted))

    async def await_newest(self, timeout_s: float) -> None:
        """Waits until the newest version has a complete checkpoint, or needs none."""
        self.newest_saved.clear()
        if not self.newest_is_saved:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.newest_saved.wait()

    @property
    def newest_is_saved(self) -> bool:
        """True if the newest version has a complete checkpoint, or needs none.

        It needs none before any step, and with checkpoint.every = 0.
        """
        return self._config.checkpoint.every == 0 or self.newest_is_restorable

    @property
    def newest_is_restorable(self) -> bool:
        """True if a trainer that restarts has the newest version, without a repeated step."""
        version = self._core.version
        if version == 0 or not self._config.has_trainer:
            return True
        saved = checkpoints.list_manifests(self._config.run_dir)
        return any(manifest.version == version for manifest in saved)

    async def run(self) -> None:
        while True:
            worker, saved, journal_seq, admitted = await self._saved.get()
            peer, version = self._committed
            # a repetition is only answered; a restarted trainer may save a version once more
            is_new = worker.peer != peer or saved.version > version
            is_committed = is_new and await self._commit(saved, journal_seq, admitted)
            await self._workers.send(worker.name, CheckpointCommitted(saved.version))
            if is_committed:
                self._committed = worker.peer, saved.version
                await self._prune()
            self._saved.task_done()

    async def finished(self) -> None:
        """Returns when all checkpoints so far are committed."""
        await self._saved.join()

    async def _commit(self, saved: CheckpointSaved, journal_seq: int, admitted: int) -> bool:
        """Returns False if the checkpoint is not usable."""
        await self._journal.durable()
        run_dir, folder = self._config.run_dir, saved.folder
        try:
            await asyncio.to_thread(
                checkpoints.commit, run_dir, saved.version, folder, journal_seq, admitted
            )
        except (DataError, OSError) as e:
            logger.error("checkpoint %s is not usable: %s; the previous one is kept", folder, e)
            return False
        logger.info("checkpoint of version %d is complete", saved.version)
        if saved.version == self._core.version:
            self.newest_saved.set()
        return True

    async def _prune(self) -> None:
        """Removes older checkpoints, and the samples that only they could request again."""
        run_dir, keep = self._config.run_dir, self._config.checkpoint.keep
        try:
            oldest = await asyncio.to_thread(checkpoints.prune, run_dir, keep)
        except OSError as e:
            logger.error("older checkpoints are not removed: %s; the next one tries again", e)
        else:
            self._prune_before(oldest)

    def _prune_before(self, oldest: int) -> None:
        """Prunes the samples of batches before `oldest`."""
        for version in [version for version in self._batches if version < oldest]:
            self._journal.prune(self._batches.pop(version))
