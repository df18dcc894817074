"""Trainer ranks, connections and workers of a simulated run (protocol_runs.py)."""

from __future__ import annotations

import asyncio
import threading
import typing
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol import weight_messages as wm
from megatron_async_rl.protocol.hub import Peer
from megatron_async_rl.protocol.leader import Leader
from megatron_async_rl.protocol.link import Rejoining, with_versions
from megatron_async_rl.protocol.orders import Command, carry_out_orders
from megatron_async_rl.protocol.sync_link import SyncLink, is_finished
from megatron_async_rl.protocol.types import Segment, join_segments
from megatron_async_rl.protocol.wire import AnyMessage, Codec
from megatron_async_rl.storage import checkpoints

if typing.TYPE_CHECKING:
    from protocol_runs import ProtocolRun

STEPS, SAVE_EVERY = 4, 3
COLLECTIVE_S = 600.0
LATENCY_S = 0.01
BUCKETS = [wm.Bucket([wm.TensorSpec("w", "float32", [2])])]


class Killed(BaseException):
    """Ends the thread of a rank."""


class Crash(Exception):
    """Ends the controller as a kill does: no worker is told."""


class Wire:
    """A worker's connection; messages arrive in order unless they are lost."""

    def __init__(self, run: ProtocolRun, name: str) -> None:
        self.run, self.name = run, name
        self.peer = Peer(next(run.numbers).to_bytes(8, "big"))
        self.to_hub: deque[tuple[float, list[bytes]]] = deque()
        self.to_worker: deque[tuple[float, list[bytes]]] = deque()
        self.inbox: deque[list[bytes]] = deque()
        self.up_at = 0.0
        self.take: Callable[[AnyMessage], None] | None = None  # none: a rank reads the inbox
        run.wires[self.peer] = self

    def break_(self) -> None:
        """Loses what is under way from some instant before on; reconnects."""
        queues = [self.to_worker] if self.run.terminated else [self.to_worker, self.to_hub]
        for queue in queues:
            for _ in range(self.run.random.randint(0, len(queue))):
                queue.popleft()
        self.up_at = self.run.now + self.run.random.uniform(0.1, 3.0)

    def deliver(self) -> bool:
        """Delivers what has arrived by now; returns whether there was anything."""
        run, found = self.run, False
        while self.to_worker and self.to_worker[0][0] <= run.now:
            frames, found = self.to_worker.popleft()[1], True
            if self.take:
                self.take(run.codec.decode(frames))
            else:
                self.inbox.append(frames)
        while run.hub and self.next_to_hub() <= run.now:
            run.hub.arrived.put_nowait((self.peer, self.to_hub.popleft()[1]))
            found = True
        return found

    def next_to_hub(self) -> float:
        return max(self.to_hub[0][0], self.up_at) if self.to_hub else float("inf")

    # ---- as the socket of a SyncLink

    def send_multipart(self, frames: list[Any], copy: bool = True) -> None:
        encoded = [bytes(frame) for frame in frames]
        if self.run.is_lost(self, self.run.codec.decode(encoded)):
            return
        self.to_hub.append((self.run.now + LATENCY_S, encoded))
        self.run.saw_message(self)

    def poll(self, timeout_ms: int) -> bool:
        self.run.rank.wait(lambda: bool(self.inbox), timeout_ms / 1000)
        return bool(self.inbox)

    def recv_multipart(self) -> list[bytes]:
        return self.inbox.popleft()

    def close(self) -> None:
        """Later messages are not read."""


class MemoryHub:
    """Replaces the controller's socket."""

    def __init__(self, run: ProtocolRun) -> None:
        self.run = run
        self.arrived: asyncio.Queue[tuple[Peer, list[bytes]]] = asyncio.Queue()

    async def receive(self) -> tuple[Peer, Any]:
        peer, frames = await self.arrived.get()
        return peer, self.run.codec.decode(frames)

    async def send(self, peer: Peer, message: m.Message) -> bool:
        wire = self.run.wires.get(peer)
        if wire is None or wire.up_at > self.run.now:
            return False
        if self.run.is_lost(wire, message):
            return True
        frames = [bytes(frame) for frame in Codec().encode(message)]
        wire.to_worker.append((self.run.now + LATENCY_S, frames))
        self.run.saw_message(wire, from_hub=True)
        return True


class Rank(threading.Thread):
    """One trainer rank: the loop of trainer/__main__.py."""

    def __init__(self, run: ProtocolRun, number: int) -> None:
        super().__init__(name=f"rank-{number}", daemon=True)
        self.protocol, self.number = run, number
        self.replica, self.stage = number // run.stages, number % run.stages
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.until = 0.0
        self.is_killed = self.has_ended = False
        self.error: BaseException | None = None
        self.num_calls: Counter[tuple[int, ...]] = Counter()
        self.version = -1

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.is_killed:
                self.train()
        except Killed:
            pass
        except BaseException as e:
            self.error = e
        self.has_ended = True
        self.protocol.main.release()

    def is_due(self) -> bool:
        if self.has_ended:
            return False
        return self.is_killed or self.ready() or self.until <= self.protocol.now

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        self.ready, self.until = ready, self.protocol.now + seconds
        self.protocol.main.release()
        self.turn.acquire()
        if self.is_killed:
            raise Killed

    def collective(self, group: tuple[int, ...], tag: str, value: Any = None) -> list[Any]:
        """Returns the values of all ranks of the group, which must make the same call."""
        calls = self.protocol.calls.setdefault((self.protocol.incarnation, group), [])
        number = self.num_calls[group]
        self.num_calls[group] += 1
        while len(calls) <= number:
            calls.append({})
        call = calls[number]
        call[self.number] = (tag, value)
        assert len({other for other, _ in call.values()}) == 1, f"ranks disagree: {call}"
        self.wait(lambda: len(call) == len(group), COLLECTIVE_S)
        assert len(call) == len(group), f"{tag}: only ranks {list(call)} came"
        return [value for _, (_, value) in sorted(call.items())]

    def sleep(self, most_s: float) -> None:
        self.wait(lambda: False, self.protocol.random.uniform(0.1, most_s))

    def train(self) -> None:
        run = self.protocol
        everyone = tuple(range(run.replicas * run.stages))
        leaders = tuple(range(0, len(everyone), run.stages))
        self.link = SyncLink(run.folder)
        is_leader, is_source = self.stage == 0, self.replica == 0
        if self.collective(everyone, "finished", is_finished(run.folder, STEPS))[0]:
            return
        if is_leader or is_source:
            leader, stage = (self.replica if is_leader else -1), (self.stage if is_source else -1)
            name = f"trainer-{self.number}"
            self.link.join(run.hello(name, leader=leader, stage=stage))
        agreement = Leader(self.link, lambda flag: any(self.collective(leaders, "vote", flag)))
        found = checkpoints.list_manifests(run.folder)
        [self.version] = set(self.collective(everyone, "load", found[0].version if found else 0))
        self.saved = self.version
        self.publish()
        while self.version < STEPS:
            share = self.next_share(agreement)
            if share is None:
                self.save(everyone)
                break
            self.collective(everyone, f"train {self.version}")
            self.sleep(4.0)
            if is_leader:
                content = [sample.ids.tobytes() for sample in share.samples]
                known = run.shares.setdefault((self.version, self.replica), content)
                assert known == content, "another batch was sent for a version"
            self.version += 1
            if self.number == 0:
                self.link.send(m.StepDone(self.version, {}))
            if self.version == STEPS:
                self.save(everyone)
            self.publish()
            if self.version % SAVE_EVERY == 0:
                self.save(everyone)
        if self.number == 0:
            self.link.await_commit()
        self.collective(everyone, "end")

    def next_share(self, agreement: Leader) -> m.TrainBatch | None:
        first = self.replica * self.protocol.stages
        replica = tuple(range(first, first + self.protocol.stages))
        if self.stage == 0:
            agreement.request(self.version)
        while True:
            answer = agreement.receive(self.version) if self.stage == 0 else None
            if self.stage and self.replica == 0:
                self.link.keep_joined()
            match self.collective(replica, "answer", answer)[0]:
                case m.Republish():
                    self.publish()
                case m.TrainBatch() as share:
                    return share
                case m.Shutdown():
                    return None

    def save(self, everyone: tuple[int, ...]) -> None:
        run, version = self.protocol, self.version
        if version == self.saved:
            return
        self.saved = version
        self.collective(everyone, f"save {version}")
        self.sleep(2.0)
        self.collective(everyone, f"saved {version}")
        if self.number == 0:
            folder = run.folder / checkpoints.FOLDER / checkpoints.folder_name(version)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__0_0.distcp").write_bytes(bytes([version]))
            checkpoints.write_digests(folder, 0, ["__0_0.distcp"])
            self.link.send(m.CheckpointSaved(version, folder.name))

    # ---- weight updates

    def publish(self) -> None:
        if self.replica == 0:
            sources = self.protocol.stages
            offer = wm.PublishOffer(self.version, self.stage, sources, BUCKETS, "gloo")
            self.link.send(offer)
            carry_out_orders(self.version, self.link, self, 1000.0)

    def open_group(self, order: wm.OpenGroup) -> None:
        self.link.send(wm.GroupOpened(order.group, self.stage, "127.0.0.1", 1))
        self.sleep(0.5)
        self.link.send(wm.GroupJoined(order.group))

    def send_buckets(self, order: wm.SendBuckets) -> wm.BucketsSent:
        self.sleep(1.0)
        return wm.BucketsSent(order.version, self.stage, {f"{self.stage}:w": "ab"}, {"send": 0.1})

    def write_snapshot(self, order: wm.WriteSnapshot) -> wm.SnapshotWritten:
        raise AssertionError("no snapshots are written here")

    def broadcast_command(self, command: Command) -> Command:
        return command


class Worker:
    """A server with its rollout worker, or a reward worker."""

    def __init__(self, run: ProtocolRun, name: str) -> None:
        self.run, self.name = run, name
        self.start()

    def start(self) -> None:
        """Begins an incarnation; the earlier one is gone."""
        self.version, self.rejoining = -1, Rejoining()
        self.wire = Wire(self.run, self.name)
        self.wire.take = self.take
        self.say(self.hello())
        self.beat(self.wire)

    def restart(self) -> None:
        self.run.wires.pop(self.wire.peer, None)
        self.run.at(self.run.random.uniform(0.5, 8.0), self.start)

    def hello(self) -> m.Hello:
        is_server = self.name.startswith("rollout")
        return with_versions(self.run.hello(self.name, serving=self.version if is_server else -1))

    def beat(self, wire: Wire) -> None:
        if wire is self.wire and wire.peer in self.run.wires:
            self.say(m.Heartbeat())
            self.run.at(2.0, lambda: self.beat(wire))

    def say(self, message: m.Message) -> None:
        self.wire.send_multipart(Codec().encode(message))

    def later(self, most_s: float, message: m.Message) -> None:
        wire = self.wire
        delay_s = self.run.random.uniform(0.1, most_s)
        self.run.at(delay_s, lambda: wire.send_multipart(Codec().encode(message)))

    def take(self, message: AnyMessage) -> None:
        match message:
            case m.RejoinRequest() if self.rejoining.needs_hello():
                self.say(self.hello())
            case m.Welcome():
                self.rejoining.welcomed()
            case m.Shutdown() | m.Refused():
                if not self.run.terminated:
                    self.restart()
            case m.Generate():
                for index in message.indices:
                    segment = Segment(message.floor_version, [3, 4], [-0.5, -0.5])
                    sample = join_segments(message.prompt.ids, [segment], "stop", "1")
                    self.later(3.0, m.Generated(message.key(index), sample))
            case m.ScoreRequest():
                reward = float(message.key.index % 2)
                self.later(0.2, m.ScoreResult(message.key, reward, call=message.call))
            case wm.UpdateWeights() | wm.AbandonUpdate():
                self.version = -1
                self.say(wm.UpdateReady(message.version, {}))
            case wm.JoinGroup():
                self.later(0.5, wm.GroupJoined(message.group))
            case wm.WeightDigests():
                self.version = message.version
                self.say(wm.Updated(message.version, {}))
