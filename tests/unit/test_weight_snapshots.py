"""Weight updates over the disk and catch-up of servers, and their behavior when a peer fails.

Sources and servers are fakes that speak the real messages and write real folders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from config_builders import config_tree
from core_builders import evaluation_tasks, make_core
from snapshot_builders import write_part
from tiny_model import make_model

from megatron_async_rl.config import load as configuration
from megatron_async_rl.controller.context import Context, EventQueue
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Send, ServerLost
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.fleet import ServerState
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.coordinator import UpdateCoordinator
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore, TrainerPublisher
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import Hello, Message, Shutdown
from megatron_async_rl.protocol.weight_messages import (
    BucketsSent,
    GroupJoined,
    GroupOpened,
    JoinGroup,
    LoadSnapshot,
    OpenGroup,
    Published,
    PublishOffer,
    SendBuckets,
    SnapshotWritten,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
    WriteSnapshot,
)
from megatron_async_rl.storage import snapshots

Answer = Callable[[Any], Message | None]
SERVERS = ["rollout-0", "rollout-1"]
LONG_S, SHORT_S = 60.0, 0.5  # deadlines of peers that answer, and of those that never do


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


class Cluster:
    """Two weight sources, two servers and the controller's parts; `faults` replace answers."""

    def __init__(
        self,
        run_dir: Path,
        model: Path,
        faults: dict[tuple[str, type], Answer] | None = None,
        **weights: Any,
    ) -> None:
        self.config = configuration.from_tree(
            config_tree(
                run={"dir": str(run_dir), "steps": 5},
                model={"path": str(model), "context_tokens": 96},
                weights={"update_timeout_s": LONG_S, "transport": "disk"} | weights,
                sglang={"device": "cpu"},
            )
        )
        self.faults = faults or {}
        self.log: list[tuple[str, Message]] = []
        self.core: Core = make_core(max_staleness=1)
        for name in SERVERS:
            self.core.handle(inputs.RolloutJoined(name, 4), 0.0)
        self.folders = SnapshotStore(self.config)
        timeout_s = self.config.weights.update_timeout_s
        self.session = UpdateSession(self.send, timeout_s, self.submit)
        self.publisher = TrainerPublisher(self.session, self.config, self.folders)
        # this class replaces the queue, the workers, the journal and the display
        context = Context(self.config, self.core, self, self, self, self)  # type: ignore[arg-type]
        self.catch_up = CatchUp(context, self.folders)
        self.updates = UpdateCoordinator(context, self.publisher, self.catch_up)

    async def submit(self, event: inputs.CoreEvent) -> None:
        await self.apply(self.core.handle(event, 0.0))

    async def durable(self) -> None:
        """Nothing is written here."""

    def published(self, outcome: Outcome) -> None:
        """Nothing is shown here."""

    async def apply(self, actions: list[Any]) -> None:
        self.core.state.take_events()
        for action in actions:
            if isinstance(action, ServerLost):
                self.updates.server_lost(action.worker)
            elif isinstance(action, Send) and isinstance(action.message, Shutdown):
                await self.send(action.worker, action.message)

    async def send(self, name: str, message: Message) -> None:
        self.log.append((name, message))
        if isinstance(message, LoadSnapshot | UpdateWeights):
            assert self.core.fleet.rollout[name].state is ServerState.UPDATING
        fault = self.faults.get((name, type(message)))
        answer = fault(message) if fault else self.answer(message)
        if answer is not None and not self.catch_up.replied(name, answer):
            self.session.inbox.put_nowait((name, answer))

    def answer(self, message: Message) -> Message | None:
        if isinstance(message, WriteSnapshot):
            files = write_part(Path(message.folder), message.version, message.part)
            return SnapshotWritten(
                message.version, files, {f"0:part{message.part}": "ab"}, "sha256", {"write": 0.01}
            )
        if isinstance(message, LoadSnapshot):
            snapshot = snapshots.read(Path(message.folder))
            assert snapshot and snapshot.manifest.digests == {"0:part0": "ab", "0:part1": "ab"}
            return Updated(
                message.version,
                {"load": 0.03},
                num_interrupted=2,
                error=snapshots.find_damage(snapshot),
            )
        return self.over_the_network(message)

    def over_the_network(self, message: Message) -> Message | None:
        if isinstance(message, UpdateWeights):
            return UpdateReady(message.version, {})
        if isinstance(message, OpenGroup):
            source = int(message.group[-1])
            self.session.inbox.put_nowait(
                (f"trainer-{source}", GroupOpened(message.group, source, "127.0.0.1", 1))
            )
        if isinstance(message, OpenGroup | JoinGroup):
            return GroupJoined(message.group)
        if isinstance(message, SendBuckets):
            return BucketsSent(message.version, 0, {}, {})
        if isinstance(message, WeightDigests):
            return Updated(message.version, {})
        return None

    async def publish(self, version: int) -> Outcome:
        offers = {f"trainer-{n}": PublishOffer(version, n, 2, [], "gloo") for n in range(2)}
        return await self.publisher.publish(version, offers, SERVERS)

    def sent(self, kind: type) -> list[str]:
        return [name for name, message in self.log if isinstance(message, kind)]

    async def settle(self) -> None:
        while self.catch_up.is_busy():
            await self.catch_up.one_done()


def in_loop(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 120))  # type: ignore[arg-type]


def test_trainer_is_released_before_servers_load_the_snapshot(tmp_path: Path, model: Path) -> None:
    cluster = Cluster(tmp_path, model)

    async def body() -> None:
        outcome = await cluster.publish(3)
        assert outcome.serving == SERVERS and outcome.num_interrupted == 4
        assert {"write", "snapshot", "load", "total"} <= outcome.seconds.keys()

    in_loop(body)
    kinds = [type(message) for _, message in cluster.log]
    assert kinds == [WriteSnapshot] * 2 + [Published] * 2 + [LoadSnapshot] * 2
    assert UpdateWeights not in kinds  # requests are not interrupted before


@pytest.mark.parametrize("fault", ["error", "silence", "short"])
def test_failed_source_keeps_old_snapshots_and_releases_all(
    tmp_path: Path, model: Path, fault: str
) -> None:
    cluster = Cluster(tmp_path, model)

    def fails(message: WriteSnapshot) -> Message | None:
        if fault == "silence":
            return None
        if fault == "error":
            return SnapshotWritten(
                message.version, [], {}, "sha256", {}, error="No space left on device"
            )
        files = write_part(Path(message.folder), message.version, message.part)
        (Path(message.folder) / files[0].name).write_bytes(b"")
        return SnapshotWritten(message.version, files, {}, "sha256", {})

    async def body() -> None:
        await cluster.publish(1)
        cluster.log.clear()
        cluster.faults = {("trainer-1", WriteSnapshot): fails}
        cluster.session.timeout_s = SHORT_S if fault == "silence" else LONG_S
        with pytest.raises(PublishError, match="the snapshot of version 2 was not written"):
            await cluster.publish(2)
        assert [snapshot.version for snapshot in snapshots.list_snapshots(tmp_path)] == [1]
        assert cluster.sent(Published) == ["trainer-0", "trainer-1"] and not cluster.sent(
            LoadSnapshot
        )
        cluster.faults = {}
        cluster.session.timeout_s = LONG_S
        await cluster.publish(2)
        assert [snapshot.version for snapshot in snapshots.list_snapshots(tmp_path)] == [2, 1]

    in_loop(body)


def test_server_that_rejects_a_snapshot_is_fenced(tmp_path: Path, model: Path) -> None:
    faults: dict[tuple[str, type], Answer] = {
        ("rollout-1", LoadSnapshot): lambda message: Updated(
            message.version, {}, error="tensor x digests to 1, not 2"
        )
    }
    cluster = Cluster(tmp_path, model, faults)

    async def body() -> None:
        outcome = await cluster.publish(1)
        assert outcome.serving == ["rollout-0"] and "tensor x" in outcome.fenced["rollout-1"]
        # the snapshot is intact
        assert [snapshot.version for snapshot in snapshots.list_snapshots(tmp_path)] == [1]

    in_loop(body)


@pytest.mark.parametrize("kind", [WriteSnapshot, LoadSnapshot])
def test_lost_server_is_not_awaited(tmp_path: Path, model: Path, kind: type) -> None:
    cluster = Cluster(tmp_path, model)

    def loses(message: Message) -> Message | None:
        cluster.core.handle(inputs.WorkerLost("rollout-1"), 0.0)
        cluster.updates.server_lost("rollout-1")
        return cluster.answer(message) if kind is WriteSnapshot else None

    async def body() -> None:
        cluster.faults[("trainer-0" if kind is WriteSnapshot else "rollout-1", kind)] = loses
        outcome = await asyncio.wait_for(cluster.publish(1), LONG_S / 2)
        assert outcome.serving == ["rollout-0"] and "lost during" in outcome.fenced["rollout-1"]
        assert cluster.sent(LoadSnapshot).count("rollout-1") == (kind is LoadSnapshot)
        cluster.faults.clear()
        cluster.core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)
        assert (await cluster.publish(2)).serving == SERVERS

    in_loop(body)


def test_offer_of_a_trainer_that_has_restarted_is_void(tmp_path: Path, model: Path) -> None:
    """Its successor has the weights of an older version, and would send them as those offered."""
    cluster = Cluster(tmp_path, model)
    cluster.core.state.version = 2
    updates = cluster.updates

    def offer(version: int) -> None:
        for source in range(2):
            updates.offered(f"trainer-{source}", PublishOffer(version, source, 2, [], "gloo"))

    async def body() -> None:
        evaluating, evaluated = asyncio.Event(), asyncio.Event()

        async def allow_update(version: int) -> None:
            evaluating.set()
            await evaluated.wait()

        updates._allow_update = allow_update
        conductor = asyncio.create_task(updates.next())
        offer(2)
        await evaluating.wait()
        for source in range(2):
            updates.worker_joined(Hello("trainer", f"trainer-{source}", 1, source, stage=source))
        offer(1)
        evaluated.set()
        for _ in range(20):
            await asyncio.sleep(0)
        conductor.cancel()

    in_loop(body)
    assert [message for _, message in cluster.log] == [Published(1, 0)] * 2


def test_offer_that_is_repeated_starts_no_second_update(tmp_path: Path, model: Path) -> None:
    """The trainer has left the update by then, and waits for a batch."""
    cluster = Cluster(tmp_path, model)
    updates, offers = cluster.updates, [PublishOffer(0, n, 2, [], "gloo") for n in range(2)]

    async def body() -> None:
        for name in SERVERS:
            cluster.core.handle(inputs.ServerUpdated(name, version=0), 0.0)
        for round_ in range(2):
            for offer in offers:
                updates.offered(f"trainer-{offer.source}", offer)
            if round_ == 0:
                assert await updates.next() == 0
        cluster.core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(updates.next(), 0.05)
        answers = [(f"trainer-{n}", Published(0, 0)) for n in range(2)]
        assert cluster.log == answers
        await updates.answer_again()  # the first answers may be lost with a connection
        await updates.answer_again()
        assert cluster.log == answers * 2

    in_loop(body)


def test_offer_that_is_repeated_during_its_update_is_not_answered(
    tmp_path: Path, model: Path
) -> None:
    cluster = Cluster(tmp_path, model)
    offers = [PublishOffer(0, n, 2, [], "gloo") for n in range(2)]

    async def body() -> None:
        async def allow_update(version: int) -> None:
            for offer in offers:
                cluster.updates.offered(f"trainer-{offer.source}", offer)
            await cluster.updates.answer_again()
            assert not cluster.log and not cluster.updates.is_idle

        cluster.updates._allow_update = allow_update
        for offer in offers:
            cluster.updates.offered(f"trainer-{offer.source}", offer)
        assert await cluster.updates.next() == 0
        await cluster.updates.answer_again()
        assert cluster.sent(Published) == ["trainer-0", "trainer-1"] and cluster.updates.is_idle

    in_loop(body)


def test_leader_that_is_no_source_withdraws_no_offer(tmp_path: Path, model: Path) -> None:
    """All ranks join a restarted controller at the same time, some with their offers."""
    cluster = Cluster(tmp_path, model)

    async def body() -> None:
        conductor = asyncio.create_task(cluster.updates.next())
        await asyncio.sleep(0)
        for source in range(2):
            offer = PublishOffer(0, source, 2, [], "gloo")
            cluster.updates.offered(f"trainer-{source}", offer)
        cluster.updates.worker_joined(Hello("trainer", "trainer-2", 1, leader=1))
        assert await asyncio.wait_for(conductor, LONG_S / 2) == 0

    in_loop(body)


@pytest.mark.parametrize("is_running", [False, True])
def test_source_that_joins_again_alone_waits_for_the_repeated_offer_of_the_other(
    tmp_path: Path, model: Path, is_running: bool
) -> None:
    cluster = Cluster(tmp_path, model)
    updates, interrupted = cluster.updates, asyncio.Event()

    def offer(source: int) -> None:
        updates.offered(f"trainer-{source}", PublishOffer(0, source, 2, [], "gloo"))

    def joins_again() -> None:
        updates.worker_joined(Hello("trainer", "trainer-0", 1, leader=0, stage=0))
        offer(0)
        interrupted.set()

    async def body() -> None:
        async def allow_update(version: int) -> None:
            if not is_running and not interrupted.is_set():
                joins_again()

        def writes(message: WriteSnapshot) -> Message | None:
            if is_running and not interrupted.is_set():
                asyncio.get_running_loop().call_soon(joins_again)
                return None
            return cluster.answer(message)

        updates._allow_update = allow_update
        cluster.faults[("trainer-1", WriteSnapshot)] = writes
        conductor = asyncio.create_task(updates.next())
        for source in range(2):
            offer(source)
        await interrupted.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        offer(1)  # after RESEND_S without an answer
        assert await asyncio.wait_for(conductor, LONG_S / 2) == 0

    in_loop(body)


def test_cleanup_of_an_update_does_not_wait_for_a_loop_that_has_ended() -> None:
    queue = EventQueue()

    async def body() -> None:
        async def update() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await queue.submit(inputs.ServerFenced("rollout-0", reason="lost"))

        running = asyncio.create_task(update())
        await asyncio.sleep(0)
        queue.close()
        running.cancel()
        await asyncio.wait([running], timeout=LONG_S)
        assert running.cancelled()

    in_loop(body)


def test_stale_server_catches_up_within_max_staleness(tmp_path: Path, model: Path) -> None:
    cluster = Cluster(tmp_path, model)
    core, fleet = cluster.core, cluster.core.fleet.rollout

    async def body() -> None:
        for version in (1, 2):
            await cluster.publish(version)
        core.state.version = 2
        core.handle(inputs.ServerUpdated("rollout-0", version=2), 0.0)
        core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)  # a new incarnation
        cluster.log.clear()
        cluster.catch_up.start(others={"rollout-1"})  # it takes part in an update
        assert not cluster.catch_up.is_busy()
        cluster.catch_up.start(others=())
        assert cluster.catch_up.is_busy("rollout-1")
        await cluster.settle()
        assert cluster.log == [
            ("rollout-1", LoadSnapshot(2, str(tmp_path / "weights" / "v000002.0")))
        ]
        assert fleet["rollout-1"].is_serving and fleet["rollout-1"].version == 2
        core.state.version = 4  # two versions ahead, and max_staleness is 1
        core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)
        cluster.catch_up.start(others=())
        assert not cluster.catch_up.is_busy()

    in_loop(body)


@pytest.mark.parametrize("fault", ["digest", "silence", "damage", "new incarnation", "lost"])
def test_failed_catch_up_fences_the_server_unless_data_is_bad(
    tmp_path: Path, model: Path, fault: str
) -> None:
    cluster = Cluster(tmp_path, model)
    core, fleet = cluster.core, cluster.core.fleet.rollout

    async def body() -> None:
        for version in (1, 2):
            await cluster.publish(version)
        core.state.version = 2
        for name in SERVERS:
            core.handle(inputs.ServerUpdated(name, version=2), 0.0)
        core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)
        newest = snapshots.list_snapshots(tmp_path)[0]
        if fault == "damage":
            next(newest.path.glob("*.safetensors")).write_bytes(b"damaged")
        else:
            error = "tensor x digests to 1, not 2"
            cluster.faults[("rollout-1", LoadSnapshot)] = lambda message: (
                Updated(message.version, {}, error=error) if fault == "digest" else None
            )
        cluster.log.clear()
        cluster.catch_up._timeout_s = SHORT_S if fault == "silence" else LONG_S
        cluster.catch_up.start(others=())
        await asyncio.sleep(0)
        if fault == "new incarnation":
            await cluster.submit(inputs.RolloutJoined("rollout-1", 4))
        elif fault == "lost":
            await cluster.submit(inputs.WorkerLost("rollout-1"))
        await asyncio.wait_for(cluster.settle(), LONG_S / 2)
        if fault == "lost":
            assert not cluster.sent(Shutdown)
            return
        server = fleet["rollout-1"]
        if fault == "damage":
            assert server.state is ServerState.STALE and not newest.path.exists()
            cluster.catch_up.start(others=())
            await cluster.settle()
            assert server.is_serving and server.version == 1  # from the previous snapshot
        elif fault == "new incarnation":
            assert server.state is ServerState.STALE and not cluster.sent(Shutdown)
        else:
            assert server.state is ServerState.FENCED and cluster.sent(Shutdown) == ["rollout-1"]
            assert (
                "tensor x" if fault == "digest" else "update_timeout_s"
            ) in server.fenced_because
            assert newest.path.exists()

    in_loop(body)


def test_catch_up_that_ends_with_an_exception_leaves_the_server_available(
    tmp_path: Path, model: Path
) -> None:
    cluster = Cluster(tmp_path, model)

    def breaks(message: LoadSnapshot) -> Message | None:
        raise OSError("Stale file handle")

    async def body() -> None:
        await cluster.publish(1)
        cluster.core.state.version = 1
        cluster.core.handle(inputs.ServerUpdated("rollout-0", version=1), 0.0)
        cluster.core.handle(inputs.RolloutJoined("rollout-1", 4), 0.0)
        cluster.faults[("rollout-1", LoadSnapshot)] = breaks
        cluster.catch_up.start(others=())
        await asyncio.wait_for(cluster.settle(), LONG_S / 2)
        assert "rollout-1" in [server.name for server in cluster.updates._available()]
        cluster.faults.clear()
        cluster.catch_up.start(others=())
        await cluster.settle()
        assert cluster.core.fleet.rollout["rollout-1"].is_serving

    in_loop(body)


def test_network_update_writes_its_snapshot_after_serving(tmp_path: Path, model: Path) -> None:
    cluster = Cluster(tmp_path, model, transport="network", snapshot_every=2)
    publisher = cluster.publisher

    async def body() -> None:
        for version, released_at_once in ((1, True), (2, False)):
            cluster.log.clear()
            assert (await cluster.publish(version)).serving == SERVERS
            assert bool(cluster.sent(Published)) == released_at_once
            await publisher.finish()
            assert cluster.sent(Published) == ["trainer-0", "trainer-1"]
        assert [snapshot.version for snapshot in snapshots.list_snapshots(tmp_path)] == [2]
        cluster.faults = {("trainer-0", WriteSnapshot): lambda message: None}
        await cluster.publish(4)
        cluster.session.timeout_s = SHORT_S
        cluster.log.clear()
        await publisher.finish()  # the error is logged and the trainer continues
        assert cluster.sent(Published) == ["trainer-0", "trainer-1"]

    in_loop(body)


def test_held_server_is_left_out_of_updates_and_catches_up_when_released(
    tmp_path: Path, model: Path
) -> None:
    cluster = Cluster(tmp_path, model)
    core, fleet = cluster.core, cluster.core.fleet.rollout

    async def body() -> None:
        await cluster.publish(1)
        core.state.version = 1
        for name in SERVERS:
            core.handle(inputs.ServerUpdated(name, version=1), 0.0)
        core.handle(inputs.EvaluationRequested(1, "held_server", evaluation_tasks(1)), 0.0)
        assert fleet["rollout-0"].is_held
        await cluster.publish(2)
        core.state.version = 2
        core.handle(inputs.ServerUpdated("rollout-1", version=2), 0.0)
        assert [server.name for server in cluster.updates._available()] == ["rollout-1"]
        cluster.log.clear()
        cluster.catch_up.start(others=())
        assert not cluster.catch_up.is_busy() and fleet["rollout-0"].version == 1
        core.handle(inputs.EvaluationAbandoned("the test ends it"), 0.0)
        cluster.catch_up.start(others=())
        await cluster.settle()
        assert cluster.sent(LoadSnapshot) == ["rollout-0"]
        assert fleet["rollout-0"].is_serving and fleet["rollout-0"].version == 2

    in_loop(body)


def test_restarted_server_takes_over_an_evaluation_from_its_snapshot(
    tmp_path: Path, model: Path
) -> None:
    cluster = Cluster(tmp_path, model)
    core, fleet = cluster.core, cluster.core.fleet.rollout

    async def body() -> None:
        for version in (1, 2):
            await cluster.publish(version)
        core.state.version = 2
        core.handle(inputs.ServerUpdated("rollout-0", version=1), 0.0)
        core.handle(inputs.ServerUpdated("rollout-1", version=2), 0.0)
        core.handle(inputs.EvaluationRequested(1, "held_server", evaluation_tasks(1)), 0.0)
        core.handle(inputs.WorkerLost("rollout-0"), 0.0)
        core.handle(inputs.RolloutJoined("rollout-0", 4), 0.0)
        assert not core.evaluation.has_server()
        cluster.log.clear()
        cluster.catch_up.wanted = cluster.catch_up.snapshot_of(1)
        cluster.catch_up.start(others=())
        await cluster.settle()
        assert fleet["rollout-0"].is_held and fleet["rollout-0"].version == 1
        assert cluster.catch_up.wanted is None
        assert cluster.sent(LoadSnapshot) == ["rollout-0"]

    in_loop(body)
