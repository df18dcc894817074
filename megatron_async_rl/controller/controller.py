"""The controller's loops, all in one process, joined by the core (core.py) that decides and this shell that acts.

    _receive    waits for: a message from any worker          does: hands it to the core, or to the publisher's inbox
    _tick       waits for: a second                            does: lease deadlines, silent workers, status.json
    _conduct    waits for: all workers; then, per version, the trainer's offers of new weights
                does: publish version 0, evaluate, open the gate; publish each version; evaluate, close the books

The trainer waits in GetBatch until the core cuts a batch; rollout workers never wait for the trainer beyond the pause
of a weight update; the core's admission (eta) is the only brake on generation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_async_rl import __version__, metrics
from megatron_async_rl.config import Config
from megatron_async_rl.controller.advantage import sample_advantages
from megatron_async_rl.controller.batching import balanced_shares, train_sample
from megatron_async_rl.controller.core import Action, Core, CutBatch, Dropped, EvalFinished, Group, Rules, Send
from megatron_async_rl.controller.ledger import DropReason
from megatron_async_rl.controller.progress import Progress
from megatron_async_rl.controller.prompts import PromptStream, read_prompts
from megatron_async_rl.controller.publisher import Publisher
from megatron_async_rl.errors import Error, ProtocolError
from megatron_async_rl.messages import (
    PROTOCOL,
    AnyMessage,
    BucketsSent,
    Failed,
    Generated,
    GenerateFailed,
    GetBatch,
    GroupJoined,
    GroupOpened,
    Heartbeat,
    Hello,
    Message,
    PublishOffer,
    Refused,
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
HEARTBEAT_LIMIT_S = 60.0
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
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        tokenizer = Tokenizer(config.model.path)
        prompts = read_prompts(config.data.train, "data.train", config, tokenizer)
        self.eval_prompts = read_prompts(config.data.eval, "data.eval", config, tokenizer) if config.data.eval else []
        self.core = Core(_rules(config), PromptStream(prompts, config.run.seed).next)
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

    async def run(self) -> None:
        """The whole run. Raises Error when it cannot go on; workers are told either way."""
        loops = [asyncio.create_task(loop()) for loop in (self._conduct, self._receive, self._tick)]
        reason = "the run is complete"
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # _conduct returned, or any of them failed
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
        await self._wait_for_workers()
        await self._publish_next(0)
        await self._evaluate()
        self.core.admitting = True
        self.progress.begin_training()
        await self._act(self.core.tick(_now()))
        for version in range(1, self.config.run.steps + 1):
            await self._publish_next(version)
        await self._evaluate()
        await self._act(self.core.end())
        self.progress.ledger = self.core.ledger.table(self.core.pending)
        self.progress.end("finished", "")

    async def _receive(self) -> None:
        while True:
            peer, message = await self.hub.receive()
            if isinstance(message, Hello):
                await self._welcome(peer, message)
                continue
            name = self._names.get(peer)
            if name is None:
                await self.hub.send(peer, Refused("unknown to this controller; say hello first"))
                continue
            self.core.fleet.heard(name, _now())
            await self._handle(name, message)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._act(self.core.tick(_now()))
            self._check_stall()
            self.progress.ledger = self.core.ledger.table(self.core.pending)
            self.progress.write(self.core.fleet)

    # ---- messages in

    async def _welcome(self, peer: Peer, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            reason = f"{hello.name} speaks protocol {hello.protocol}, this controller ({__version__}) {PROTOCOL}"
            await self.hub.send(peer, Refused(f"{reason}; install the same version everywhere"))
            return
        self.workers[hello.name] = Worker(hello.name, peer, hello)
        self._names[peer] = hello.name
        await self.hub.send(peer, Welcome(self.core.epoch))
        logger.info("%s joined (pid %d)", hello.name, hello.pid)
        if hello.role == "rollout":
            await self._act(self.core.rollout_joined(hello.name, hello.capacity, _now()))
        elif hello.role == "reward":
            await self._act(self.core.reward_joined(hello.name, hello.capacity, _now()))
        self._changed.set()

    async def _handle(self, name: str, message: AnyMessage) -> None:
        core, now = self.core, _now()
        if isinstance(message, Generated):
            self.progress.generated(message.sample)
            await self._act(core.generated(name, message, now))
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
            await self._act(core.step_done(message.version, now))
            self.progress.ledger = core.ledger.table(core.pending)
            self.progress.step_done(message.version, message.stats)
        elif isinstance(message, PublishOffer):
            self._offers[name] = message
            if len(self._offers) == message.num_stages:
                self._offered.set()
        elif isinstance(message, _PUBLISH_ANSWERS):
            self.publisher.inbox.put_nowait((name, message))
        elif isinstance(message, Failed):
            raise Error(f"{name}: {message.error}")
        elif not isinstance(message, Heartbeat):
            raise ProtocolError(f"{name} sent {type(message).__name__}, which is not for the controller")

    # ---- actions out

    async def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                await self._send_to(action.worker, action.message)
            elif isinstance(action, CutBatch):
                await self._send_batch(action)
            elif isinstance(action, Dropped):
                if action.reason is not DropReason.RUN_ENDED:
                    logger.info("group %d dropped: %s", action.group.group_id, action.reason.value)
            elif self._eval_result is not None and not self._eval_result.done():
                self._eval_result.set_result(action)

    async def _send_to(self, name: str, message: Message) -> None:
        worker = self.workers.get(name)
        if worker is None or not await self.hub.send(worker.peer, message):
            logger.warning("%s is not connected; %s not delivered", name, type(message).__name__)

    async def _send_batch(self, cut: CutBatch) -> None:
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
        self.progress.batch_cut(cut.version, cut.groups, rewards, advantages, waited_s)

    def _advantages(self, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
        rewards = np.asarray([group.rewards for group in groups], np.float64)
        tokens = np.asarray([[sample.num_generated for sample in group.samples if sample] for group in groups])
        return rewards, sample_advantages(rewards, tokens, self.config.algorithm)

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

    async def _publish_next(self, version: int) -> None:
        """Waits for the offers of `version` and brings every server to it."""
        await self._offered.wait()
        offers, self._offers = self._offers, {}
        self._offered.clear()
        versions = {offer.version for offer in offers.values()}
        if versions != {version}:
            raise ProtocolError(f"the trainer offers weights of versions {versions}, expected {version}")
        servers = [w.name for w in self.core.fleet.rollout.values() if not w.reason]
        outcome = await self.publisher.publish(version, offers, servers, self.core.updating)
        for name, reason in outcome.fenced.items():
            logger.error("%s is fenced: %s", name, reason)
            await self._act(self.core.fenced(name, reason, _now()))
        for name in outcome.serving:
            await self._act(self.core.serving(name, version, _now()))
        self.progress.published(outcome)

    async def _evaluate(self) -> None:
        """One sample of every evaluation prompt, under the weights now served."""
        if not self.eval_prompts:
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

    def _check_stall(self) -> None:
        silent_s = _now() - self.progress.last_progress
        if self.progress.training and silent_s > self.config.run.stall_s:
            raise Error(
                f"nothing was generated or trained for {silent_s:.0f} s (run.stall_s = {self.config.run.stall_s:.0f}): "
                f"{self._who_waits()}"
            )

    def _who_waits(self) -> str:
        groups = dict(Counter(group.state.value for group in self.core.groups.values()))
        trainer = (
            "the trainer waits for a batch" if self._waits_for_batch_since else "the controller waits for the trainer"
        )
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
        silence_limit_s=HEARTBEAT_LIMIT_S,
        steps=config.run.steps,
        data_parallel_size=config.trainer.data_parallel_size,
    )


def _now() -> float:
    return time.monotonic()
