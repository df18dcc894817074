"""A seeded fuzz of the protocol: a running controller, honest workers, and wrong messages.

The honest workers answer what the controller sends them, in any order, so that the run generates,
scores, trains and updates weights. Between their messages come wrong ones, from every role and from
sockets that have not joined: fields with random values, other types, damaged bytes, messages of the
controller, earlier messages again, messages of one worker over the socket of another. A worker that
is refused starts again over a new socket.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from config_builders import config_tree
from controller_shell import hello_of

from megatron_async_rl.config import load
from megatron_async_rl.controller.controller import Controller
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.settings import core_settings
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal
from megatron_async_rl.data.dataset import read_training
from megatron_async_rl.data.order import PromptStream
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol import weight_messages as wm
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.types import PROBE_TOKENS, Partial, Segment, join_segments
from megatron_async_rl.protocol.wire import (
    AnyMessage,
    Codec,
    Malformed,
    UnknownHello,
    read_unknown_hello,
)

PERIOD = 200  # messages
LIMIT_S = 120.0
CONTEXT_TOKENS, MAX_STALENESS, ALL_MESSAGES = 96, 1, typing.get_args(AnyMessage)
BUCKETS = [wm.Bucket([wm.TensorSpec("w", "float32", [2])])]
INTEGERS = [-(1 << 62), -3, -2, -1, 0, 1, 2, 3, 5, 100, 1 << 31, 1 << 53, (1 << 63) - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e300, -1.0, 0.0, 0.5]
TEXTS = [
    "", "x", "\0", "a\nb", "../../x", "v000001", "train/loss", "perf/time/train_s", "rollout-0",
    "rollout-1", "reward-0", "trainer-0", "trainer-1", "x" * 5000, "\u202e", "weights-1-source0",
]  # fmt: skip


class FuzzHub:
    """Stands for the Hub: bytes in, messages out, through the real codec."""

    def __init__(self) -> None:
        self._codec = Codec(max_length=CONTEXT_TOKENS, max_decoded_bytes=12 * CONTEXT_TOKENS)
        self._arrived: asyncio.Queue[tuple[Peer, Any]] = asyncio.Queue()
        self.sent: collections.deque[tuple[Peer, m.Message]] = collections.deque()
        self.num_malformed = 0

    def arrive(self, peer: Peer, frames: list[bytes]) -> None:
        message: m.Message | UnknownHello | Malformed
        try:
            message = self._codec.decode(frames)
        except ProtocolError as e:
            self.num_malformed += 1
            message = read_unknown_hello(frames[0]) or Malformed(str(e))
        self._arrived.put_nowait((peer, message))

    @property
    def is_idle(self) -> bool:
        return self._arrived.empty()

    async def receive(self) -> tuple[Peer, Any]:
        return await self._arrived.get()

    async def send(self, peer: Peer, message: m.Message) -> bool:
        Codec().encode(message)
        self.sent.append((peer, message))
        return True


@dataclass
class FuzzWorker:
    """An honest worker. `pending`: messages of the controller that it has not answered."""

    hello: m.Hello
    peer: Peer
    pending: list[m.Message] = field(default_factory=list)
    version: int = 0  # trainer: of its weights
    said: list[list[bytes]] = field(default_factory=list)  # lately, in frames


@dataclass
class FuzzResult:
    messages: int
    wrong: int
    malformed: int
    refused: Counter[str]
    fenced: int
    version: int
    batches: int
    ledger: dict[str, int]


class ProtocolFuzz:
    def __init__(self, model_and_dataset: tuple[Path, Path], run_dir: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.inputs, self.run_dir = model_and_dataset, run_dir
        self.config = load.from_tree(
            config_tree(
                run={"dir": str(run_dir), "steps": 10**6, "no_progress_timeout_s": 1e6},
                model={"path": str(model_and_dataset[0]), "context_tokens": CONTEXT_TOKENS},
                data={"train": str(model_and_dataset[1])},
                rollout={"max_new_tokens": 64, "servers": 2, "lease_timeout_s": 20.0},
                staleness={"max_staleness": MAX_STALENESS, "straggler_timeout_s": 0.5},
                algorithm={"prompts_per_step": 2, "samples_per_prompt": 2},
                weights={"update_timeout_s": 5.0},
            )
        )
        self.num_sockets = self.num_messages = self.num_wrong = self.num_batches = 0
        self.num_probes = self.num_probed_batches = 0
        rank: dict[str, int] = {"leader": 0, "stage": 0}
        self.workers = [
            FuzzWorker(self.hello(name, **more), self.new_peer())
            for name, more in [
                *((name, {}) for name in ("rollout-0", "rollout-1", "reward-0")),
                ("trainer-0", rank),
                *((name, {}) for name in ("rollout-8", "reward-8", "trainer-8")),
            ]
        ]
        self.attackers = self.workers[-3:]
        self.strangers = [self.new_peer() for _ in range(3)]

    async def run(self, num_messages: int, num_steps: int = 2) -> FuzzResult:
        """Sends so many messages, and more until `num_steps` steps are trained, at most LIMIT_S.

        Raises the controller's error, if any, and AssertionError for a broken guarantee.
        """
        with contextlib.ExitStack() as opened:
            journal = Journal(self.run_dir / JOURNAL_FILE)
            opened.callback(journal.close)
            log = RunLog(self.run_dir, self.config)
            opened.callback(log.close)
            self.hub = FuzzHub()
            self.controller = Controller(self.config, typing.cast(Any, self.hub), log, journal)
            running = asyncio.create_task(self.controller.run())
            deadline = time.monotonic() + LIMIT_S
            try:
                for worker in self.workers:
                    self.say(worker, worker.hello)
                while self.num_messages < num_messages or (
                    self.controller.core.version < num_steps and time.monotonic() < deadline
                ):
                    self.step()
                    if self.num_messages % 8 == 0:
                        await self.settle(running)
                await self.settle(running)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            await journal.durable()
            core = self.controller.core
            core.state.check()
            self.check_restore(journal)
            return FuzzResult(
                self.num_messages, self.num_wrong, self.hub.num_malformed,
                self.controller.handlers.num_refused, core.num_fenced_messages, core.version,
                self.num_batches, core.state.ledger.table(core.state.pending),
            )  # fmt: skip

    # ---- the controller

    async def settle(self, running: asyncio.Task[None]) -> None:
        """Lets the controller handle the arrived messages; then its guarantees must hold."""
        for _ in range(200):
            await asyncio.sleep(0)
            if running.done():
                running.result()
                raise AssertionError("the controller ended")
            if self.hub.is_idle:
                break
        await asyncio.sleep(0.0005)  # the journal's thread writes
        core = self.controller.core
        core.state.check()
        limit = (core.version + MAX_STALENESS + 1) * core.settings.prompts_per_step
        assert core.state.ledger.trained + core.state.pending <= limit, (
            "admitted past max_staleness"
        )
        while self.hub.sent:
            peer, message = self.hub.sent.popleft()
            for worker in self.workers:
                if worker.peer == peer:
                    self.took(worker, message)

    def check_restore(self, journal: Journal) -> None:
        """A controller that starts again has the same ledger."""
        tokenizer = Tokenizer(self.config.model.path)
        prompts = read_training(self.config, tokenizer)
        stream = PromptStream(prompts, self.config.run.seed)
        restored = Core(core_settings(self.config), stream.next, epoch=0)
        restored.restore(journal.events())
        core = self.controller.core
        assert restored.version == core.version
        assert restored.state.ledger.admitted == core.state.ledger.admitted
        assert restored.state.ledger.trained == core.state.ledger.trained

    # ---- honest workers

    def hello(self, name: str, **more: int) -> m.Hello:
        role = typing.cast(m.Role, name.split("-")[0])
        return hello_of(self.inputs, role, name, **more)

    def new_peer(self) -> Peer:
        self.num_sockets += 1
        return Peer(self.num_sockets.to_bytes(8, "big"))

    def took(self, worker: FuzzWorker, message: m.Message) -> None:
        if isinstance(message, m.ProbeRequest):
            self.num_probes += 1
        if isinstance(message, m.TrainBatch):
            self.check_batch(message)
        if isinstance(message, m.Refused | m.Shutdown):
            worker.peer, worker.pending = self.new_peer(), []
            # a trainer starts from a checkpoint
            worker.version = min(worker.version, self.controller.core.version)
            self.say(worker, worker.hello)
        elif isinstance(message, m.RejoinRequest):
            worker.pending = []
            self.say(worker, worker.hello)
        else:
            worker.pending.append(message)

    def check_batch(self, batch: m.TrainBatch) -> None:
        self.num_batches += 1
        assert len(batch.samples) == 4
        self.num_probed_batches += any(sample.probe_index >= 0 for sample in batch.samples)
        for sample in batch.samples:
            generated = sample.versions[sample.versions >= 0]
            assert sample.versions.min() >= -1 and len(generated)
            assert batch.version - MAX_STALENESS <= generated.min(), "stale"
            assert generated.max() <= batch.version
            assert len(sample.ids) <= CONTEXT_TOKENS and sample.ids.min() >= 0
            assert sample.ids.max() < self.controller.core.settings.vocab_size
            assert np.isfinite(sample.advantages).all() and sample.logprobs.max() <= 0.01

    def answers(self, message: m.Message, worker: FuzzWorker) -> list[m.Message]:
        match message:
            case m.Welcome() if worker.hello.stage >= 0:
                return [wm.PublishOffer(worker.version, 0, 1, BUCKETS, "gloo")]
            case m.Generate():
                return [self.sampled(message, index) for index in message.indices]
            case m.ScoreRequest():
                reward = self.random.choice([0.0, 1.0])
                return [m.ScoreResult(message.key, reward, call=message.call)]
            case wm.UpdateWeights() | wm.AbandonUpdate():
                return [wm.UpdateReady(message.version, {"interrupt": 0.1})]
            case wm.OpenGroup():
                opened = wm.GroupOpened(message.group, 0, "127.0.0.1", 1)
                return [opened, wm.GroupJoined(message.group)]
            case wm.JoinGroup():
                return [wm.GroupJoined(message.group)]
            case wm.SendBuckets():
                return [wm.BucketsSent(message.version, 0, {"0:w": "ab"}, {"send": 0.1})]
            case wm.WriteSnapshot():
                return [
                    wm.SnapshotWritten(message.version, [], {}, "sha256", {}, "the disk is full")
                ]
            case wm.WeightDigests() | wm.LoadSnapshot():
                return [wm.Updated(message.version, {"pause": 0.1})]
            case m.ProbeRequest():
                found = np.full(len(message.windows) * PROBE_TOKENS, -0.5, np.float32)
                return [m.ProbeResult(message.version, found)]
            case wm.Published() if worker.hello.leader >= 0:
                return [m.GetBatch(worker.version)]
            case m.Republish():
                return [wm.PublishOffer(worker.version, 0, 1, BUCKETS, "gloo")]
            case m.TrainBatch():
                worker.version = message.version + 1
                stats = {
                    "train/loss": 0.1,
                    "train/tokens": 9.0,
                    "perf/time/proximal_s": 0.1,
                    "perf/time/train_s": 0.5,
                }
                return [
                    m.StepDone(worker.version, stats),
                    wm.PublishOffer(worker.version, 0, 1, BUCKETS, "gloo"),
                ]
        return [m.Heartbeat(0, 1)]

    def sampled(self, lease: m.Generate, index: int) -> m.Message:
        ids = [self.random.randrange(8) for _ in range(self.random.randint(1, 9))]
        segment = Segment(lease.floor_version, ids, [-0.5] * len(ids))
        sample = join_segments(lease.prompt.ids, [segment], "stop", "1")
        if self.random.random() < 0.05:
            return m.GenerateFailed(lease.key(index), "x")
        if self.random.random() < 0.1:
            return m.ScoreRequest(lease.key(index), "1", call=1)
        if self.random.random() < 0.1:
            partial = Partial(sample.ids, sample.logprobs, sample.versions)
            return m.PartialSample(lease.key(index), partial)
        return m.Generated(lease.key(index), sample)

    # ---- messages

    def step(self) -> None:
        """Sends one honest answer, or a wrong message."""
        waiting = [worker for worker in self.workers if worker.pending]
        if self.random.random() < 0.1:
            worker = self.random.choice(self.workers)  # a late or duplicate message
            self.transmit(worker.peer, self.random.choice(worker.said))
        elif waiting and self.random.random() < 0.7:
            worker = self.random.choice(waiting)
            message = worker.pending.pop(self.random.randrange(min(3, len(worker.pending))))
            for answer in self.answers(message, worker):
                self.say(worker, answer)
        elif self.random.random() < 0.1:
            self.say(self.random.choice(self.workers), m.Heartbeat(0, 1))
        else:
            self.wrong()

    def say(self, worker: FuzzWorker, message: m.Message) -> None:
        frames = [bytes(frame) for frame in Codec().encode(message)]
        worker.said = [*worker.said[-50:], frames]
        self.transmit(worker.peer, frames)

    def transmit(self, peer: Peer, frames: list[bytes]) -> None:
        self.num_messages += 1
        self.hub.arrive(peer, frames)

    def wrong(self) -> None:
        self.num_wrong += 1
        choose = self.random
        # in every second period only workers that the run does not depend on are attackers
        is_storm = self.num_messages // PERIOD % 2
        sender = choose.choice(self.workers if is_storm else self.attackers)
        peer = choose.choice([sender.peer] * 3 + self.strangers)
        kind = choose.choice(["field", "field", "random", "random", "type", "bytes", "again"])
        if kind in ("field", "random"):
            message = self.some_message(sender) if kind == "field" else self.random_message()
            if isinstance(message, m.Failed) and not self.controller.progress.training:
                return  # before training this ends the run by design
            with contextlib.suppress(ProtocolError):
                frames = [bytes(f) for f in Codec().encode(self.with_other_field(message))]
                self.transmit(peer, frames)
            return
        frames = list(choose.choice(choose.choice(self.workers).said))
        if kind == "type":
            header = msgspec.msgpack.decode(frames[0])
            values = [None, -1, 2.5, "x", [], {}, True, dict(header)]
            header[choose.choice([*header, "unknown"])] = choose.choice(values)
            frames[0] = msgspec.msgpack.encode(header)
        elif kind == "bytes":
            number = choose.randrange(len(frames))
            damaged = bytearray(frames[number] or b"\0")
            for _ in range(choose.randint(1, 4)):
                damaged[choose.randrange(len(damaged))] = choose.randrange(256)
            frames[number] = bytes(damaged)
        if choose.random() < 0.1:
            frames = frames[:-1] or [b""]
        for _ in range(choose.randint(1, 2)):
            self.transmit(peer, frames)

    def some_message(self, sender: FuzzWorker) -> m.Message:
        """Returns a possible answer of the worker now, or its message when it joined."""
        if sender.pending and self.random.random() < 0.9:
            saved, answered = sender.version, self.random.choice(sender.pending)
            answers = self.answers(answered, sender)
            sender.version = saved
            return self.random.choice(answers)
        return sender.hello

    def random_message(self) -> m.Message:
        return typing.cast(m.Message, self.value(self.random.choice(ALL_MESSAGES)))

    def with_other_field(self, value: Any) -> Any:
        hints = typing.get_type_hints(type(value))
        names = [name for name in value.__struct_fields__ if name not in ("package", "schema")]
        if not names:
            return value
        name = self.random.choice(names)
        now = getattr(value, name)
        if isinstance(now, msgspec.Struct) and self.random.random() < 0.8:
            other = self.with_other_field(now)
        elif isinstance(now, np.ndarray) and len(now) and self.random.random() < 0.7:
            other = np.array(now)
            other[self.random.randrange(len(other))] = self.random.choice(
                [-2, -1, 0, 1, 50, 1 << 30]
            )
        elif isinstance(now, int) and self.random.random() < 0.4:
            other = max(min(now + self.random.choice([-1, 1]), (1 << 63) - 1), -(1 << 63))
        else:
            other = self.value(hints[name])
        return msgspec.structs.replace(value, **{name: other})

    def value(self, kind: Any) -> Any:
        """Returns a random value of a field's type."""
        choose, arguments = self.random, typing.get_args(kind)
        origin = typing.get_origin(kind)
        if origin is typing.Literal:
            return choose.choice(arguments)
        if origin is list:
            return [self.value(arguments[0]) for _ in range(choose.randrange(3))]
        if origin is dict:
            return {self.value(str): self.value(arguments[1]) for _ in range(choose.randrange(3))}
        if arguments:  # a union
            return self.value(choose.choice(arguments))
        if kind is np.ndarray:
            dtype = choose.choice([np.int32, np.float32])
            length = choose.choice([0, 1, 5, 96, 97, 5000])
            return np.full(length, choose.choice([-2, -1, 0, 1, 1000]), dtype)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = typing.get_type_hints(kind)
            fields = msgspec.structs.fields(kind)
            return kind(**{f.name: self.value(hints[f.name]) for f in fields})
        if kind is bool:
            return choose.random() < 0.5
        simple = {int: INTEGERS, float: FLOATS, str: TEXTS, type(None): [None]}
        return choose.choice(simple.get(kind, TEXTS))
