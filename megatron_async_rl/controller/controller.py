"""The controller: one queue and one loop. The core decides (core/core.py), this file executes.

    sockets --> _receive --MessageArrived--+
    clock   --> _tick    --Tick------------+--> queue --> _loop: actions = core.handle(event)
    SIGTERM --> _drain   --DrainStarted----+                     journal.append(its events)
    updates, catch-up, evaluation          |                     for each action: _carry_out
                --ServerUpdated, ...-------+

Only the loop changes the core and appends to the journal. It never waits for another task, a disk
or a worker. A task that needs a decision submits an event and waits until it is applied:

    _receive        waits for: a message, and room in the queue
    _tick           waits for: a second, and its Tick      writes status.json, looks for stalls
    _conduct        waits for: all workers, then the trainer's offers of weights
                    runs: each update; the evaluations that are due, with or without waiting
    _drain          waits for: SIGTERM, then the trainer's checkpoint; ends the run as preempted
    _stop_at_once   waits for: SIGINT; ends the run as preempted
    delivery.run    waits for: a selected batch, then the journal on disk; sends the batch
    saving.run      waits for: a saved checkpoint, then the journal on disk; commits the checkpoint

Messages that other processes cannot undo are sent only when the journal is on disk: a batch
(delivery.py), a weight update (coordinator.py), a checkpoint (saving.py).

Every process may end and be restarted. A restarted worker sends Hello and has no work at first:

    rollout worker  is STALE until it takes a verified update
    reward worker   gets the requests that are waiting
    trainer         starts from its checkpoint and gets the recorded batches again; the weights that
                    it offers are not needed until it is back at the newest version
    controller      reads the journal; servers that kept their weights meanwhile continue

The trainer waits in GetBatch until the core selects a batch. Rollout workers never wait for the
trainer, except paused during a weight update; admission (max_staleness) limits generation.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterable, Iterator

from megatron_async_rl.config.config import Config
from megatron_async_rl.controller.context import Context, EventQueue, MessageArrived
from megatron_async_rl.controller.core import actions, inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import DropReason
from megatron_async_rl.controller.core.settings import core_settings
from megatron_async_rl.controller.delivery import BatchDelivery
from megatron_async_rl.controller.evaluation.evaluation import Evaluations
from megatron_async_rl.controller.filters import filter_rules
from megatron_async_rl.controller.handlers import MessageHandlers
from megatron_async_rl.controller.journal import events
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.controller.monitoring import watchdog
from megatron_async_rl.controller.monitoring.monitors import Monitors
from megatron_async_rl.controller.monitoring.progress import Progress
from megatron_async_rl.controller.monitoring.timeline import Timeline
from megatron_async_rl.controller.saving import CheckpointCommitter
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.coordinator import UpdateCoordinator
from megatron_async_rl.controller.weight_sync.session import RelabelPublisher, UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.controller.workers import Workers
from megatron_async_rl.data.dataset import read_evaluation, read_training
from megatron_async_rl.data.digests import changed_data
from megatron_async_rl.data.order import PromptStream
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, Error, Preempted
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol.hub import Hub
from megatron_async_rl.protocol.messages import Hello, Republish, Shutdown

logger = logging.getLogger(__name__)
TICK_S = 1.0
REJOIN_TICKS = 10  # from the first server that joins a restarted controller to the last
COMMIT_S = 30.0  # for the checkpoint of the last version, whose report may be lost
DRAIN_SHARE = 0.8  # of faults.shutdown_grace_s, within which the trainer must save


class Controller:
    def __init__(self, config: Config, hub: Hub, run_log: RunLog, journal: Journal) -> None:
        if changed := changed_data(config.run_dir, config):
            raise ConfigError(changed)
        tokenizer = Tokenizer(config.model.path, config.reward.thinking_tags)
        self.progress = Progress(run_log, config)
        prompts = read_training(config, tokenizer, self.progress.warn)
        eval_prompts = read_evaluation(config, tokenizer, self.progress.warn)
        self.config = config
        self.journal = journal
        self.queue = EventQueue()
        timeline = Timeline(config.run_dir, config.monitor.trace_steps)
        self.workers = Workers(hub, timeline)
        stream = PromptStream(prompts, config.run.seed)
        filters = filter_rules(config.algorithm.filters)
        self.core = Core(core_settings(config, filters), stream.next, epoch=0)
        context = Context(config, self.core, self.queue, self.workers, self.journal, self.progress)
        timeout_s = config.weights.update_timeout_s
        session = UpdateSession(self.workers.send, timeout_s, self.queue.submit)
        store = SnapshotStore(config)
        self.publisher = (
            TrainerPublisher(session, config, store)
            if config.has_trainer
            else RelabelPublisher(session)
        )
        catch_up = CatchUp(context, store)
        self.evaluations = Evaluations(context, eval_prompts, catch_up)
        self.updates = UpdateCoordinator(
            context, self.publisher, catch_up, self.evaluations.allow_update
        )
        self.monitors = Monitors(config, self.core.state, self.progress)
        self.delivery = BatchDelivery(context, self.monitors.mismatch)
        self.saving = CheckpointCommitter(context)
        self.handlers = MessageHandlers(context, self.updates, self.delivery, self.saving)
        self._context = context
        self._hub = hub
        self._restore()

    def _restore(self) -> None:
        """Rebuilds the state from the journal."""
        self.saving.check_journal()
        self.core.restore(self._seen(self.journal.events()))
        self.journal.append(self.core.state.take_events())
        self.publisher.start_epoch(self.core.epoch)
        if self.core.state.ledger.admitted:
            self.core.handle(inputs.AdmissionOpened(), time.monotonic())
            ledger = self._ledger()
            self.progress.resumed(self.core.version, ledger, self.core.state.in_batch)
            self.progress.begin_training()
        self.workers.timeline.begin(self.core.version)

    def _seen(self, recorded: Iterable[events.AnyEvent]) -> Iterator[events.AnyEvent]:
        """Yields the events, which are too many to keep, and records some of them."""
        held: set[int] = set()  # groups whose samples are not pruned
        for event in recorded:
            if isinstance(event, events.SampleReturned):
                held.add(event.group_id)
            elif isinstance(event, events.BatchSelected) and held.intersection(event.group_ids):
                self.saving.saw(event)
            elif isinstance(event, events.StepReported):
                self.progress.restore(event)
            yield event

    async def run(self) -> None:
        """Runs to the end and notifies all workers. Raises Error if the run fails.

        Any other exception is a crash: the workers then join the restarted controller, as after a
        kill.
        """
        preempted = asyncio.Event()
        interrupted = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, preempted.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
        bodies = (
            self._loop(), self._receive(), self._tick(), self._conduct(), self._drain(preempted),
            self.delivery.run(), self.saving.run(), self._stop_at_once(interrupted),
        )  # fmt: skip
        tasks = [asyncio.create_task(body) for body in bodies]
        reason: str | None = None
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # _conduct returned, or one of them failed
            reason = "the run is complete"
        except Preempted as e:
            reason = str(e)
            self.progress.end("stopped", reason, self._ledger())
            raise
        except Error as e:
            reason = f"the controller stops: {e}"
            self.progress.end("failed", str(e), self._ledger())
            raise
        finally:
            self.queue.close()
            for task in tasks:
                task.cancel()
            if reason:
                for worker in self.workers:
                    await self._hub.send(worker.peer, Shutdown(reason))

    # ---- the loop

    async def _loop(self) -> None:
        while True:
            event, applied = await self.queue.get()
            if isinstance(event, MessageArrived):
                for core_event in await self.handlers.handle(event.peer, event.message):
                    await self._apply(core_event)
                if isinstance(event.message, Hello):
                    self.updates.start_catch_up()
            else:
                await self._apply(event)
                if isinstance(event, inputs.Tick):
                    await self._request_weights()
            if applied and not applied.done():
                applied.set_result(None)

    async def _apply(self, event: inputs.CoreEvent) -> None:
        if isinstance(event, inputs.Received):
            self.monitors.received(event.worker, event.message)
        followed = self.core.handle(event, time.monotonic())
        recorded = self.core.state.take_events()
        self.journal.append(recorded)
        for entry in recorded:
            self.saving.saw(entry)
        self.monitors.saw(recorded)
        # before the first await: the restarted server may be in the next update
        for action in followed:
            if isinstance(action, actions.ServerLost):
                self.updates.server_lost(action.worker)
        for action in followed:
            if isinstance(action, actions.Send):
                await self.workers.send(action.worker, action.message)
            else:
                self._carry_out(action)

    def _carry_out(self, action: actions.Action) -> None:
        match action:
            case actions.SendBatch() | actions.ResendBatch():
                self.delivery.send(action)
            case actions.ReportEvaluated():
                self.evaluations.sample_ended(action)
            case actions.FinishEvaluation():
                self.evaluations.finish(action)
            case actions.ReportSample():
                self.progress.generated(action.sample)
            case actions.ReportStep():
                self._report_step(action)
            case actions.ReportDrop() if action.reason is not DropReason.RUN_ENDED:
                self.progress.dropped(action.group.group_id, action.reason.value)
            case actions.ReportError():
                logger.error("%s", action.error)
            case actions.ReportScoringError():
                self.monitors.scores.failed(action.where, action.error)

    def _report_step(self, step: actions.ReportStep) -> None:
        self.progress.ledger = self._ledger()
        self.delivery.step_reported(step.version)
        self.updates.step_reported()
        if step.stats is None:
            self.progress.replayed(step.version, self.core.version)
        else:
            stats = self.monitors.step(step.version, step.stats)
            self.journal.append([self.progress.step_done(step.version, stats)])
            self.monitors.check_step(step.version, stats)

    async def _request_weights(self) -> None:
        """Gives weights to servers that joined between updates, from a snapshot or the trainer."""
        self.updates.start_catch_up()
        await self.updates.answer_again()
        if self.updates.must_republish():
            await self._apply(inputs.BatchesHeld(True))  # until the trainer has published
            for leader in self.workers.leaders:  # experts may be on any replica
                await self.workers.send(leader.name, Republish(self.core.version))

    # ---- the tasks that feed the loop

    async def _receive(self) -> None:
        while True:
            await self.queue.put(MessageArrived(*await self._hub.receive()))

    async def _tick(self) -> None:
        context, core, progress = self._context, self.core, self.progress
        while True:
            await asyncio.sleep(TICK_S)
            await self.queue.submit(inputs.Tick())
            watchdog.check(context, self.delivery.awaited_since)
            await self.evaluations.check()
            progress.ledger = self._ledger()
            names = [worker.name for worker in self.workers]
            progress.lost = [name for name in names if not self.handlers.is_trusted(name)]
            if self.journal.error:
                progress.say(f"the journal cannot be written: {self.journal.error}")
            elif progress.training:
                progress.say("")
            progress.write(core.fleet, self.monitors.engines.newest)

    async def _conduct(self) -> None:
        if not self._was_complete():
            await self._conduct_updates()
        await self.queue.submit(inputs.RunEnded())
        await self.saving.await_newest(COMMIT_S)
        await self.saving.finished()
        await self.journal.durable()
        self.progress.end("finished", "", self._ledger())

    def _was_complete(self) -> bool:
        """Returns whether an earlier controller was killed when nothing was left but its end.

        A trainer that has lost the last version, which was not saved, repeats its last steps.
        """
        version = self.core.version
        is_trained = version >= self.config.run.steps and not self.core.state.pending
        is_left = not self.saving.newest_is_restorable or self.evaluations.is_due(version)
        return is_trained and not is_left

    async def _conduct_updates(self) -> None:
        """Runs all weight updates and evaluations."""
        if not self.core.admitting:
            await self.workers.wait_for_all(self.config, self.progress.say)
        first = asyncio.create_task(self.updates.next())
        kept = await self._kept_version(first)
        update = first if kept >= 0 else None  # is still to come
        version = kept if kept >= 0 else await first
        if version < self.config.run.steps:
            await self.evaluations.begin(version)
        if not self.core.admitting:
            if self.config.evaluation.mode == "pause":
                await self.evaluations.ended()
            self.progress.begin_training()
            await self.queue.submit(inputs.AdmissionOpened())
        while version < self.config.run.steps:
            version = await (update or self.updates.next())
            update = None
            if version < self.config.run.steps:
                await self.evaluations.begin(version)
        await self.evaluations.ended()  # training does not wait for one
        if any(worker.is_serving for worker in self.core.fleet.rollout.values()):
            await self.evaluations.begin(version)
            await self.evaluations.ended()
        elif self.config.has_trainer:
            logger.error(
                "no server took the last version: it is trained and exported, but not evaluated"
            )

    async def _kept_version(self, update: asyncio.Task[int]) -> int:
        """Returns the version that servers have kept over a restart of the controller, -1 if none.

        No offer tells of it: the trainer makes the next one after its step, and none after its
        last, when it may have ended. Waits until the servers have joined, or `update` is done.
        """
        seen = 0  # ticks since a server with the newest version has joined
        while not update.done() and seen < REJOIN_TICKS:
            try:
                await asyncio.wait([update], timeout=TICK_S)
            except asyncio.CancelledError:
                update.cancel()
                raise
            fleet, version = self.core.fleet.rollout, self.core.version
            is_kept = any(w.is_serving and w.version == version for w in fleet.values())
            seen = seen + 1 if is_kept and self.updates.is_idle else 0
        return -1 if update.done() else self.core.version

    async def _drain(self, preempted: asyncio.Event) -> None:
        """At SIGTERM lets rollout workers return their tokens and the trainer save.

        Raises Preempted.
        """
        await preempted.wait()
        reason = "the job was told to end (SIGTERM); run it again to continue"
        logger.warning("%s", reason)
        await self.queue.submit(inputs.DrainStarted())
        order = self.workers.ending = Shutdown(reason)  # also for those that join from now on
        for worker in self.workers:
            await self.workers.send(worker.name, order)
        await self.saving.await_newest(self.config.faults.shutdown_grace_s * DRAIN_SHARE)
        await self.journal.durable()
        raise Preempted(reason)

    async def _stop_at_once(self, interrupted: asyncio.Event) -> None:
        """At SIGINT, which the launcher sends for Ctrl-C, raises Preempted: nothing is awaited."""
        await interrupted.wait()
        raise Preempted("stopped at once; run it again to continue")

    def _ledger(self) -> dict[str, int]:
        return self.core.state.ledger.table(self.core.state.pending)
