"""The controller's loops, all in one process, joined by the core (core.py) that decides and this shell that acts.

    _receive    waits for: a message from any worker          does: hands it to the core, or to the publisher's inbox
    _tick       waits for: a second                            does: lease deadlines, silent workers, status.json
    _conduct    waits for: all workers; then for the trainer's offers of weights
                does: publish version 0, evaluate, open the gate; publish each version; evaluate, close the books

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
import math
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_async_rl import __version__, checkpoints, metrics
from megatron_async_rl.config import Config
from megatron_async_rl.controller.advantage import sample_advantages
from megatron_async_rl.controller.batching import balanced_shares, train_sample
from megatron_async_rl.controller.core import (
    Action,
    Core,
    CutBatch,
    Dropped,
    EvalFinished,
    Group,
    Replay,
    Rules,
    Send,
)
from megatron_async_rl.controller.facts import Admitted, Batched, Closed, Evaluated
from megatron_async_rl.controller.fleet import ServerState
from megatron_async_rl.controller.journal import Journal
from megatron_async_rl.controller.ledger import DropReason
from megatron_async_rl.controller.lengths import LengthMeter
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.prompts import PromptStream, read_prompts
from megatron_async_rl.controller.publisher import Publisher
from megatron_async_rl.errors import DataError, Error, Preempted, ProtocolError, PublishError
from megatron_async_rl.messages import (
    PROTOCOL,
    AnyMessage,
    BucketsSent,
    CheckpointSaved,
    Failed,
    Generated,
    GenerateFailed,
    GetBatch,
    GroupJoined,
    GroupOpened,
    Heartbeat,
    Hello,
    Message,
    PartialSample,
    Published,
    PublishOffer,
    Refused,
    Republish,
    SayHello,
    Scored,
    Shutdown,
    StepDone,
    TrainBatch,
    Updated,
    UpdateReady,
    Welcome,
)
from megatron_async_rl.tokenizer import Tokenizer
from megatron_async_rl.transport import Hub, Peer

logger = logging.getLogger(__name__)
TICK_S = 1.0
DRAIN_SHARE = 0.8  # of faults.grace_s: the trainer's save must be done by then
_PUBLISH_ANSWERS = (UpdateReady, GroupOpened, GroupJoined, BucketsSent, Updated)
_NO_EVAL_REWARD = 0.0  # an evaluation sample that could not be had counts as wrong, and the log says so


@dataclass
class Worker:
    """One connected worker, as the shell knows it."""

    name: str
    peer: Peer
    hello: Hello


@dataclass
class Controller:
    config: Config
    hub: Hub
    run_log: metrics.RunLog
    journal: Journal
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        tokenizer = Tokenizer(config.model.path)
        prompts = read_prompts(config.data.train, "data.train", config, tokenizer)
        self.eval_prompts = read_prompts(config.data.eval, "data.eval", config, tokenizer) if config.data.eval else []
        self.core = Core(_rules(config), PromptStream(prompts, config.run.seed).next, epoch=0)
        self.lengths = LengthMeter()
        self.publisher = Publisher(
            self._send_to,
            int(config.sglang.get("tp_size", 1)),
            config.weights.update_timeout_s,
            config.weights.verify_every,
        )
        self.progress = Progress(self.run_log, config)
        self._names: dict[Peer, str] = {}
        self._changed = asyncio.Event()  # a worker joined or left
        self._offers: dict[str, PublishOffer] = {}
        self._offered = asyncio.Event()
        self._eval_result: asyncio.Future[EvalFinished] | None = None
        self._waits_for_batch_since: float | None = None
        self._republish_asked: frozenset[str] = frozenset()
        self._publishing: asyncio.Task[None] | None = None
        self._saved = asyncio.Event()  # the trainer has saved the newest version
        self._trained_groups: dict[int, list[int]] = {}  # version of the batch -> its groups, until pruned
        self._evaluated: set[int] = set()
        self._restore()

    def _restore(self) -> None:
        """Goes on from the journal. Raises DataError when a checkpoint knows of facts that the journal lacks."""
        saved = checkpoints.manifests(self.config.run_dir)
        if saved and saved[0].journal_seq > self.journal.last_seq:
            raise DataError(
                f"checkpoint {saved[0].folder} was written after {saved[0].journal_seq} facts, but the journal in "
                f"{self.config.run_dir} has {self.journal.last_seq}: it is not this run's, or an old copy; put the right one "
                "back, or begin anew with --from-scratch"
            )
        facts = list(self.journal.facts())
        self.core.restore(facts)
        self.journal.append(self.core.take_facts())
        self.publisher.begin_life(self.core.epoch)
        for fact in facts:
            if isinstance(fact, Batched):
                self._trained_groups[fact.version] = fact.group_ids
            elif isinstance(fact, Evaluated):
                self._evaluated.add(fact.version)
                self.progress.evaluated(fact.version, fact.accuracy, fact.num)
        if any(isinstance(fact, Admitted) for fact in facts):
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
            for worker in self.workers.values():
                await self.hub.send(worker.peer, Shutdown(reason))

    # ---- the loops

    async def _conduct(self) -> None:
        if not self.core.admitting:
            await self._wait_for_workers()
            await self._publish_next()
            await self._evaluate()
            self.core.admitting = True
            self.progress.begin_training()
            await self._act(self.core.tick(_now()))
        while await self._publish_next() < self.config.run.steps:
            pass
        if any(worker.is_serving for worker in self.core.fleet.rollout.values()):
            await self._evaluate()
        else:
            logger.error("no server took the last version: it is trained and exported, but not evaluated")
        await self._act(self.core.end())
        await self.journal.durable()
        self.progress.ledger = self.core.ledger.table(self.core.pending)
        self.progress.end("finished", "")

    async def _receive(self) -> None:
        while True:
            peer, message = await self.hub.receive()
            if isinstance(message, Hello):
                await self._welcome(peer, message)
                continue
            name = self._names.get(peer)
            if name is None or self.workers[name].peer != peer or not self._is_trusted(name):
                await self.hub.send(peer, SayHello())
                continue
            self.core.fleet.heard(name, _now())
            await self._handle(name, message)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.journal.error:  # a batch waits for the disk, and so do we, before we listen again
                for name in self.workers:
                    self.core.fleet.heard(name, _now())
            await self._act(self.core.tick(_now()))
            await self._ask_for_weights()
            self._check_stall()
            self.progress.ledger = self.core.ledger.table(self.core.pending)
            self.progress.lost = [name for name in self.workers if not self._is_trusted(name)]
            if self.progress.training or self.journal.error:
                self.progress.message = self.journal.error and f"the journal cannot be written: {self.journal.error}"
            self.progress.write(self.core.fleet)

    # ---- messages in

    async def _welcome(self, peer: Peer, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            reason = f"{hello.name} speaks protocol {hello.protocol}, this controller ({__version__}) {PROTOCOL}"
            await self.hub.send(peer, Refused(f"{reason}; install the same version everywhere"))
            return
        before = self.workers.get(hello.name)
        if before:
            self._names.pop(before.peer, None)
        self.workers[hello.name] = Worker(hello.name, peer, hello)
        self._names[peer] = hello.name
        await self.hub.send(peer, Welcome(self.core.epoch))
        logger.info("%s joined (pid %d)", hello.name, hello.pid)
        self.publisher.forget(hello.name)
        if hello.role == "rollout":
            self._republish_asked -= {hello.name}
            await self._act(self.core.rollout_joined(hello.name, hello.capacity, _now()))
            if not before and 0 <= hello.serving <= self.core.version:  # it took that version in, digests and all
                await self._act(self.core.serving(hello.name, hello.serving, _now()))
        elif hello.role == "reward":
            await self._act(self.core.reward_joined(hello.name, hello.capacity, _now()))
        elif hello.role == "trainer":
            self._trainer_joined(hello)
        self._changed.set()

    def _trainer_joined(self, hello: Hello) -> None:
        self.core.trainer_joined(hello.leader)
        self._waits_for_batch_since = None
        self._republish_asked = frozenset()
        self._offers.pop(hello.name, None)
        if self._publishing and hello.stage >= 0:
            self._publishing.cancel()  # it waits for what the old one had promised

    def _is_trusted(self, name: str) -> bool:
        """False for a worker that the core has given up as lost: it must say hello first."""
        hello = self.workers[name].hello
        return hello.role == "trainer" or name in self.core.fleet.rollout or name in self.core.fleet.reward

    async def _handle(self, name: str, message: AnyMessage) -> None:
        core, now = self.core, _now()
        if isinstance(message, Generated):
            self.progress.generated(message.sample)
            await self._act(core.generated(name, message, now))
        elif isinstance(message, PartialSample):
            await self._act(core.interrupted(name, message))
        elif isinstance(message, GenerateFailed):
            logger.warning("%s: sample %d.%d: %s", name, message.group_id, message.index, message.error)
            await self._act(core.generate_failed(name, message, now))
        elif isinstance(message, Scored):
            if message.reward is None:
                logger.warning("%s: no verdict on %d.%d: %s", name, message.group_id, message.index, message.error)
            await self._act(core.scored(name, message, now))
        elif isinstance(message, GetBatch):
            self._waits_for_batch_since = self._waits_for_batch_since or now
            await self._act(core.batch_wanted(self.workers[name].hello.leader, message.version, now))
        elif isinstance(message, StepDone):
            is_new = message.version == core.version + 1
            await self._act(core.step_done(message.version, now))
            self.progress.ledger = core.ledger.table(core.pending)
            if is_new:
                self.progress.step_done(message.version, message.stats | self.lengths.step())
                self.lengths.check(self.progress.warn)
            else:
                self.progress.replayed(message.version, core.version)
        elif isinstance(message, CheckpointSaved):
            await self._commit_checkpoint(message)
        elif isinstance(message, PublishOffer):
            self._offers[name] = message
            if len(self._offers) == message.num_stages:
                self._offered.set()
        elif isinstance(message, _PUBLISH_ANSWERS):
            self.publisher.inbox.put_nowait((name, message))
        elif isinstance(message, Failed):
            if not self.progress.training:
                raise Error(f"{name}: {message.error}")
            logger.error("%s: %s", name, message.error)
            await self._act(core.worker_lost(name, now))
        elif not isinstance(message, Heartbeat):
            raise ProtocolError(f"{name} sent {type(message).__name__}, which is not for the controller")

    # ---- actions out

    async def _act(self, actions: list[Action]) -> None:
        facts = self.core.take_facts()
        self.journal.append(facts)
        for fact in facts:
            self.lengths.saw(fact)
            if isinstance(fact, Batched):
                self._trained_groups[fact.version] = fact.group_ids
            elif isinstance(fact, Closed):
                self.journal.prune([fact.group_id])
        for action in actions:
            if isinstance(action, Send):
                await self._send_to(action.worker, action.message)
            elif isinstance(action, CutBatch):
                await self.journal.durable()  # a batch that the trainer has seen is never forgotten
                await self._send_batch(action)
            elif isinstance(action, Replay):
                await self._send_batch(self._recorded(action.version), replayed=True)
            elif isinstance(action, Dropped):
                if action.reason is not DropReason.RUN_ENDED:
                    logger.info("group %d dropped: %s", action.group.group_id, action.reason.value)
            elif self._eval_result is not None and not self._eval_result.done():
                self._eval_result.set_result(action)

    async def _send_to(self, name: str, message: Message) -> None:
        worker = self.workers.get(name)
        if worker is None or not await self.hub.send(worker.peer, message):
            logger.warning("%s is not connected; %s not delivered", name, type(message).__name__)

    def _recorded(self, version: int) -> CutBatch:
        """The batch that was trained on `version`, from the journal."""
        admitted, returned, judged = self.journal.batch(version)
        count = self.config.algorithm.samples_per_prompt
        groups = {f.group_id: Group(f.group_id, None, "train", [None] * count, [None] * count) for f in admitted}
        for sample in returned:
            groups[sample.group_id].samples[sample.index] = sample.sample
        for verdict in judged:
            groups[verdict.group_id].rewards[verdict.index] = verdict.reward
        return CutBatch(version, list(groups.values()))

    async def _send_batch(self, cut: CutBatch, replayed: bool = False) -> None:
        rewards, advantages = self._advantages(cut.groups)
        samples = [
            train_sample(sample, float(advantages[g, s]))
            for g, group in enumerate(cut.groups)
            for s, sample in enumerate(group.samples)
            if sample is not None
        ]
        shares = balanced_shares(samples, self.config.trainer.data_parallel_size)
        for worker in [w for w in self.workers.values() if w.hello.leader >= 0]:
            await self._send_to(worker.name, TrainBatch(cut.version, shares[worker.hello.leader]))
        waited_s = _now() - (self._waits_for_batch_since or _now())
        self._waits_for_batch_since = None
        if not replayed:
            self.progress.batch_cut(cut.version, cut.groups, rewards, advantages, waited_s)

    def _advantages(self, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
        rewards = np.asarray([group.rewards for group in groups], np.float64)
        tokens = np.asarray([[sample.num_generated for sample in group.samples if sample] for group in groups])
        return rewards, sample_advantages(rewards, tokens, self.config.algorithm, self.config.rollout.max_new_tokens)

    # ---- stages of the run

    async def _wait_for_workers(self) -> None:
        """All the workers that the configuration asks for. Raises Error naming who is missing."""
        config = self.config
        stages = config.parallel_size("pipeline_model")
        expected = {
            *(f"rollout-{i}" for i in range(config.rollout.servers)),
            *(f"reward-{i}" for i in range(config.reward.workers)),
        }
        limit_s = max(config.rollout.start_timeout_s, config.trainer.start_timeout_s)
        deadline = _now() + limit_s
        while True:
            missing = expected - self.workers.keys()
            missing |= {f"trainer stage {s}" for s in range(stages)} - {
                f"trainer stage {w.hello.stage}" for w in self.workers.values()
            }
            missing |= {f"trainer leader {r}" for r in range(config.trainer.data_parallel_size)} - {
                f"trainer leader {w.hello.leader}" for w in self.workers.values()
            }
            if not missing:
                return
            self.progress.message = f"waiting for {', '.join(sorted(missing))}"
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - _now())
            except TimeoutError:
                raise Error(f"{', '.join(sorted(missing))} did not start within {limit_s:.0f} s; see logs/") from None

    async def _publish_next(self) -> int:
        """Waits for the trainer's next offers and brings the servers that lack them to these weights.

        Returns the version that the fleet is at now. A broken update is tried again by the trainer's next offer.
        """
        while True:
            await self._offered.wait()
            offers, self._offers = self._offers, {}
            self._offered.clear()
            version = min(offer.version for offer in offers.values())
            while version >= self.core.version and all(w.reason for w in self.core.fleet.rollout.values()):
                self._changed.clear()  # nobody to give it to: the trainer waits with us
                await self._changed.wait()
            fleet = self.core.fleet.rollout.values()
            servers = [w.name for w in fleet if not w.reason and not (w.is_serving and w.version >= version)]
            if version < self.core.version or (not servers and any(w.is_serving for w in fleet)):
                for name in offers:  # a trainer on its way back to where it was, or nobody needs them
                    await self._send_to(name, Published(version, 0))
                if version == self.core.version:
                    break
                continue
            await self.journal.durable()  # StepDone before anyone holds its weights
            self._publishing = asyncio.create_task(self._publish(version, offers, servers))
            try:
                await self._publishing
                break
            except PublishError as e:
                logger.error("the update to version %d failed: %s", version, e)
                if version == self.config.run.steps:
                    break  # the trainer has no further offer; only the last evaluation needed it
            except asyncio.CancelledError:
                if not self._publishing.cancelled():
                    raise
                logger.warning("the trainer came back during the update to version %d: waiting for its offer", version)
            finally:
                self._publishing = None
                self.core.hold_batches = False
        self.core.hold_batches = False
        await self._act(self.core.tick(_now()))
        return version

    async def _publish(self, version: int, offers: dict[str, PublishOffer], servers: list[str]) -> None:
        lives = {name: self.core.fleet.rollout[name] for name in servers}
        try:
            outcome = await self.publisher.publish(version, offers, servers, self.core.updating)
        finally:
            for name, reason in self.publisher.outcome.fenced.items():
                logger.error("%s is fenced: %s", name, reason)
                if self.core.fleet.rollout.get(name) is lives[name]:
                    await self._act(self.core.fenced(name, reason, _now()))
                    await self._send_to(name, Shutdown(f"fenced: {reason}"))  # a new life of it starts clean
        for name in outcome.serving:
            if self.core.fleet.rollout.get(name) is lives[name]:
                await self._act(self.core.serving(name, version, _now()))
        self.progress.published(outcome)

    async def _ask_for_weights(self) -> None:
        """A server that came (back) while the trainer waits for a batch would otherwise get no weights."""
        if self._publishing:
            return
        without = (ServerState.STALE, ServerState.UPDATING)  # the latter: of an update that came to nothing
        stale = {w.name for w in self.core.fleet.rollout.values() if w.state in without}
        leader = next((w for w in self.workers.values() if w.hello.leader == 0), None)
        if not self.core.batch_awaited or self.core.hold_batches or not stale - self._republish_asked or not leader:
            return
        self._republish_asked = frozenset(stale)
        self.core.hold_batches = True  # until the trainer is back from publishing
        await self._send_to(leader.name, Republish(self.core.version))

    # ---- checkpoints and the end of a job

    async def _commit_checkpoint(self, saved: CheckpointSaved) -> None:
        """Ties the trainer's files to the books, and forgets what no kept checkpoint can ask for."""
        await self.journal.durable()
        run_dir = self.config.run_dir
        try:
            await asyncio.to_thread(
                checkpoints.commit,
                run_dir,
                saved.version,
                saved.folder,
                self.journal.last_seq,
                self.core.ledger.admitted,
            )
            oldest = await asyncio.to_thread(checkpoints.prune, run_dir, self.config.checkpoint.keep)
        except (DataError, OSError) as e:
            logger.error("checkpoint %s is not usable: %s; the one before stays", saved.folder, e)
            return
        logger.info("checkpoint of version %d is complete", saved.version)
        for version in [version for version in self._trained_groups if version < oldest]:
            self.journal.prune(self._trained_groups.pop(version))
        if saved.version == self.core.version:
            self._saved.set()

    async def _drain(self, preempted: asyncio.Event) -> None:
        """SIGTERM: nothing new starts, rollouts hand in what they have, the trainer saves. Raises Preempted."""
        await preempted.wait()
        reason = "the job was told to end (SIGTERM); it goes on from here when run again"
        logger.warning("%s", reason)
        self.core.admitting, self.core.hold_batches = False, True
        self._saved.clear()
        for worker in list(self.workers.values()):
            await self._send_to(worker.name, Shutdown(reason))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._saved.wait(), self.config.faults.grace_s * DRAIN_SHARE)
        await self._act([])
        await self.journal.durable()
        raise Preempted(reason)

    async def _evaluate(self) -> None:
        """One sample of every evaluation prompt, under the weights now served."""
        if not self.eval_prompts or self.core.version in self._evaluated:
            return
        self.progress.state = "evaluating"
        self._eval_result = asyncio.get_running_loop().create_future()
        await self._act(self.core.start_eval(self.eval_prompts, _now()))
        result = await self._eval_result
        rewards = [reward for group in result.groups for reward in group.rewards]
        if failed := rewards.count(None):
            logger.warning("%d of %d evaluation samples could not be had and count as wrong", failed, len(rewards))
        accuracy = float(np.mean([_NO_EVAL_REWARD if reward is None else reward for reward in rewards]))
        self.progress.evaluated(result.version, accuracy, len(rewards))
        self._evaluated.add(result.version)
        self.journal.append([Evaluated(result.version, accuracy, len(rewards))])

    def _check_stall(self) -> None:
        silent_s = _now() - self.progress.last_progress
        if self.progress.training and silent_s > self.config.run.stall_s:
            self._dump_stacks()
            raise Error(
                f"nothing was generated or trained for {silent_s:.0f} s (run.stall_s = {self.config.run.stall_s:.0f}): "
                f"{self._who_waits()}"
            )

    def _dump_stacks(self) -> None:
        """Every process of this host writes the stacks of its threads into its log."""
        for pid in [os.getpid(), *(worker.hello.pid for worker in self.workers.values())]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGUSR2)

    def _who_waits(self) -> str:
        groups = dict(Counter(group.state.value for group in self.core.groups.values()))
        trainer = (
            "the trainer waits for a batch" if self._waits_for_batch_since else "the controller waits for the trainer"
        )
        if self.journal.error:
            trainer += f"; the journal cannot be written ({self.journal.error}): make room on the disk of run.dir"
        servers = ", ".join(f"{w.name} {w.state.value} with {w.load} samples" for w in self.core.fleet.rollout.values())
        return f"{trainer}; groups {groups}; {servers}; next group would be of step {self.core.next_step}"


def _rules(config: Config) -> Rules:
    return Rules(
        prompts_per_step=config.algorithm.prompts_per_step,
        samples_per_prompt=config.algorithm.samples_per_prompt,
        eta=config.staleness.eta,
        wait_for_stragglers=config.staleness.straggler == "wait",
        straggler_wait_s=config.staleness.straggler_wait_s,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        eval_temperature=config.data.eval_temperature,
        lease_timeout_s=config.rollout.lease_timeout_s,
        max_attempts=config.rollout.max_attempts,
        max_verdict_attempts=config.reward.max_attempts,
        drop_equal_rewards=config.algorithm.drop_equal_rewards,
        success_rates=(
            -math.inf if config.algorithm.success_rate_min is None else config.algorithm.success_rate_min,
            math.inf if config.algorithm.success_rate_max is None else config.algorithm.success_rate_max,
        ),
        silence_limit_s=config.faults.silence_s,
        steps=config.run.steps,
        data_parallel_size=config.trainer.data_parallel_size,
    )


def _now() -> float:
    return time.monotonic()
