"""The controller's loops, all in one process, joined by the core (core.py) that decides and this shell that acts.

    _receive    waits for: a message from any worker          does: what handlers.py says for each
    _tick       waits for: a second                           does: lease deadlines, silent workers, status.json
    _conduct    waits for: all workers; then for the trainer's offers of weights
                does: publish version 0, evaluate, open the gate; publish each version; evaluate, close the books
    _drain      waits for: SIGTERM                            does: nothing new starts, everybody saves, Preempted

Every event ends in `_act`: its facts go to the journal, then its actions are done. A sample's way through the files:
updates.py (a server has weights), leases.py (it is leased), handlers.py (it is back), verdicts.py (it is scored),
cut.py and delivery.py (it is trained), saving.py (its tokens are forgotten).

Any process may end and come back, this one too. What the core may not forget is in the journal before it is acted on;
a worker that comes back says hello, and has nothing until it is given something:

    rollout worker  is STALE until it takes a verified update; while the trainer waits for a batch it is asked for one
    reward worker   gets the verdicts that are owed
    trainer         starts at its checkpoint, gets the recorded batches again, and offers weights nobody needs until it
                    is where it was
    controller      reads the journal; workers that held their weights through its absence go on serving

The trainer waits in GetBatch until the core cuts a batch; rollout workers never wait for the trainer beyond the pause
of a weight update; the core's admission (eta) is the only brake on generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller import watchdog
from megatron_async_rl.controller.core.actions import (
    Action,
    Dropped,
    EvalFinished,
    ResendBatch,
    Send,
    SendBatch,
    ServerLost,
)
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.events import (
    BatchSelected,
    EvaluationFinished,
    GroupAdmitted,
)
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.controller.core.settings import core_settings
from megatron_async_rl.controller.delivery import Delivery
from megatron_async_rl.controller.evaluation import Evaluation
from megatron_async_rl.controller.handlers import Handlers
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.length_monitor import LengthMeter
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.saving import Saving
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.coordinator import Updates
from megatron_async_rl.controller.weight_sync.relabel import Relabeler
from megatron_async_rl.controller.weight_sync.session import UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.data.dataset import PromptStream, read_prompts
from megatron_async_rl.data.tokenizer import Tokenizer, fingerprint
from megatron_async_rl.errors import Error, Preempted
from megatron_async_rl.observability import run_log
from megatron_async_rl.protocol.messages import Shutdown
from megatron_async_rl.protocol.transport import Hub

logger = logging.getLogger(__name__)
TICK_S = 1.0
DRAIN_SHARE = 0.8  # of faults.shutdown_grace_s: the trainer's save must be done by then


class Controller:
    def __init__(self, config: Config, hub: Hub, run_log: run_log.RunLog, journal: Journal) -> None:
        tokenizer = Tokenizer(config.model.path)
        prompts = read_prompts(config.data.train, "data.train", config, tokenizer)
        eval_prompts = (
            read_prompts(config.data.eval, "data.eval", config, tokenizer)
            if config.data.eval
            else []
        )
        act = self._act
        self.config = config
        self.journal = journal
        self.workers = Workers(hub)
        self.core = Core(
            core_settings(config), PromptStream(prompts, config.run.seed).next, epoch=0
        )
        self.lengths = LengthMeter()
        self.progress = Progress(run_log, config)
        folders = SnapshotStore(config)
        exchange = UpdateSession(self.workers.send, config.weights.update_timeout_s)
        self.publisher = (
            TrainerPublisher(exchange, config, folders)
            if config.has_trainer
            else Relabeler(exchange)
        )
        catch_up = CatchUp(self.core, self.workers, folders, config.weights.update_timeout_s, act)
        self.updates = Updates(
            self.core, self.publisher, catch_up, self.workers, journal, self.progress, config.run.steps, act
        )  # fmt: skip
        self.delivery = Delivery(config, journal, self.workers, self.progress)
        self.saving = Saving(config, self.core, journal)
        self.evaluation = Evaluation(eval_prompts, self.core, journal, self.progress, act)
        self.handlers = Handlers(
            fingerprint(config.model.path),
            self.core, self.workers, self.publisher, self.updates, self.delivery, self.saving, self.lengths,
            self.progress, act,
        )  # fmt: skip
        self._hub = hub
        self._restore()

    def _restore(self) -> None:
        """Goes on from the journal."""
        self.saving.check_journal()
        facts = list(self.journal.facts())
        self.core.restore(facts)
        self.journal.append(self.core.take_events())
        self.publisher.start_generation(self.core.epoch)
        for fact in facts:
            if isinstance(fact, BatchSelected):
                self.saving.saw(fact)
            elif isinstance(fact, EvaluationFinished):
                self.evaluation.known(fact)
        if any(isinstance(fact, GroupAdmitted) for fact in facts):
            self.core.admitting = True
            self.progress.resumed(self.core.version, self.core.ledger.table(self.core.pending))
            self.progress.begin_training()

    async def run(self) -> None:
        """The whole run. Raises Error when it cannot go on; workers are told either way."""
        preempted = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, preempted.set)
        loops = [asyncio.create_task(loop()) for loop in (self._conduct, self._receive, self._tick)]
        loops.append(asyncio.create_task(self._drain(preempted)))
        reason = "the run is complete"
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # _conduct returned, or any of them failed
        except Preempted as e:
            reason = str(e)
            self.progress.end("stopped", reason)
            raise
        except BaseException as e:
            reason = f"the controller stops: {e}"
            self.progress.end("failed", str(e))
            raise
        finally:
            for task in loops:
                task.cancel()
            for worker in self.workers:
                await self._hub.send(worker.peer, Shutdown(reason))

    # ---- the loops

    async def _conduct(self) -> None:
        if not self.core.admitting:
            await self.workers.wait_for_all(self.config, self.progress.say)
            await self.updates.next()
            await self.evaluation.run()
            self.core.admitting = True
            self.progress.begin_training()
            await self._act(self.core.tick(time.monotonic()))
        while await self.updates.next() < self.config.run.steps:
            pass
        if not self.config.has_trainer:
            pass  # the model is the one that was evaluated at the start
        elif any(worker.is_serving for worker in self.core.fleet.rollout.values()):
            await self.evaluation.run()
        else:
            logger.error(
                "no server took the last version: it is trained and exported, but not evaluated"
            )
        await self._act(self.core.end())
        await self.journal.durable()
        self.progress.ledger = self.core.ledger.table(self.core.pending)
        self.progress.end("finished", "")

    async def _receive(self) -> None:
        while True:
            await self.handlers.received(*await self._hub.receive())

    async def _tick(self) -> None:
        core, progress = self.core, self.progress
        while True:
            await asyncio.sleep(TICK_S)
            if (
                self.journal.error
            ):  # a batch waits for the disk, and so do we, before we listen again
                for worker in self.workers:
                    core.fleet.heard(worker.name, time.monotonic())
            await self._act(core.tick(time.monotonic()))
            await self.updates.ask_for_weights()
            self._check_stall()
            progress.ledger = core.ledger.table(core.pending)
            progress.lost = [
                worker.name for worker in self.workers if not self.handlers.is_trusted(worker.name)
            ]
            if progress.training or self.journal.error:
                progress.say(
                    self.journal.error and f"the journal cannot be written: {self.journal.error}"
                )
            progress.write(core.fleet)

    async def _drain(self, preempted: asyncio.Event) -> None:
        """SIGTERM: nothing new starts, rollouts hand in what they have, the trainer saves. Raises Preempted."""
        await preempted.wait()
        reason = "the job was told to end (SIGTERM); it goes on from here when run again"
        logger.warning("%s", reason)
        self.core.admitting, self.core.hold_batches = False, True
        self.saving.newest_saved.clear()
        for worker in self.workers:
            await self.workers.send(worker.name, Shutdown(reason))
        save_s = (
            self.config.faults.shutdown_grace_s * DRAIN_SHARE if self.config.has_trainer else 0.0
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.saving.newest_saved.wait(), save_s)
        await self._act([])
        await self.journal.durable()
        raise Preempted(reason)

    # ---- what follows an event

    async def _act(self, actions: list[Action]) -> None:
        facts = self.core.take_events()
        self.journal.append(facts)
        for fact in facts:
            self.lengths.saw(fact)
            self.saving.saw(fact)
        for action in actions:
            if isinstance(
                action, ServerLost
            ):  # before anything is awaited: its next life may be in the next update
                self.updates.server_lost(action.name)
        for action in actions:
            if isinstance(action, Send):
                await self.workers.send(action.worker, action.message)
            elif isinstance(action, SendBatch):
                await self.delivery.send(action)
            elif isinstance(action, ResendBatch):
                await self.delivery.send_again(action.version)
            elif isinstance(action, Dropped):
                if action.reason is not DropReason.RUN_ENDED:
                    logger.info("group %d dropped: %s", action.group.group_id, action.reason.value)
            elif isinstance(action, EvalFinished):
                self.evaluation.finished(action)

    def _check_stall(self) -> None:
        silent_s = time.monotonic() - self.progress.last_progress
        if not self.progress.training or silent_s <= self.config.run.no_progress_timeout_s:
            return
        watchdog.dump_stacks(self.workers)
        since = self.delivery.awaited_since
        waits = watchdog.who_waits(
            self.core, self.workers, since, self.journal.error, time.monotonic()
        )
        raise Error(
            f"nothing was generated or trained for {silent_s:.0f} s (run.no_progress_timeout_s = {self.config.run.no_progress_timeout_s:.0f}): {waits}"
        )
