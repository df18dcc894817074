"""The controller's half of a checkpoint: the manifest that ties the trainer's files to the journal, and what may go then."""

from __future__ import annotations

import asyncio
import logging

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.events import (
    BatchSelected,
    BatchTrained,
    GroupDropped,
    JournalEvent,
)
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.messages import CheckpointSaved
from megatron_async_rl.storage import checkpoints

logger = logging.getLogger(__name__)


class Saving:
    def __init__(self, config: Config, core: Core, journal: Journal) -> None:
        self._config = config
        self._core = core
        self._journal = journal
        self._batches: dict[
            int, list[int]
        ] = {}  # version -> the groups trained on it, until pruned
        self.newest_saved = asyncio.Event()  # the trainer has saved the newest version

    def saw(self, fact: JournalEvent) -> None:
        """The samples of a batch are kept for a trainer that comes back; those of a dropped group are of no use."""
        if isinstance(fact, BatchSelected):
            self._batches[fact.version] = fact.group_ids
        elif isinstance(fact, GroupDropped):
            self._journal.prune([fact.group_id])
        elif isinstance(fact, BatchTrained) and not self._config.has_trainer:
            self._forget(
                fact.version - 1
            )  # the newest file is asked for again at a start, none before it

    async def commit(self, saved: CheckpointSaved) -> None:
        """Ties the trainer's files to the books, and forgets what no kept checkpoint can ask for."""
        await self._journal.durable()
        run_dir = self._config.run_dir
        try:
            await asyncio.to_thread(
                checkpoints.commit,
                run_dir,
                saved.version,
                saved.folder,
                self._journal.last_seq,
                self._core.ledger.admitted,
            )
            oldest = await asyncio.to_thread(
                checkpoints.prune, run_dir, self._config.checkpoint.keep
            )
        except (DataError, OSError) as e:
            logger.error("checkpoint %s is not usable: %s; the one before stays", saved.folder, e)
            return
        logger.info("checkpoint of version %d is complete", saved.version)
        self._forget(oldest)
        if saved.version == self._core.version:
            self.newest_saved.set()

    def _forget(self, oldest: int) -> None:
        """The samples of batches before `oldest`."""
        for version in [version for version in self._batches if version < oldest]:
            self._journal.prune(self._batches.pop(version))

    def check_journal(self) -> None:
        """Raises DataError when a checkpoint knows of facts that the journal lacks."""
        saved = checkpoints.manifests(self._config.run_dir)
        if saved and saved[0].journal_seq > self._journal.last_seq:
            raise DataError(
                f"checkpoint {saved[0].folder} was written after {saved[0].journal_seq} facts, but the journal in "
                f"{self._config.run_dir} has {self._journal.last_seq}: it is not this run's, or an old copy; put the right "
                "one back, or begin anew with --from-scratch"
            )
