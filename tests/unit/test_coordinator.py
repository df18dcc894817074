"""Interrupt modes of a weight update and the calls that they make, with a fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from update_parts import Sent, make_config

from megatron_async_rl.errors import ConfigError, EngineError
from megatron_async_rl.model.engine import engine_versions
from megatron_async_rl.protocol.weight_messages import (
    AbandonUpdate,
    Bucket,
    LoadSnapshot,
    ReceiveBuckets,
    StageBuckets,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import Abort, Finish, Pause, make_interruption
from megatron_async_rl.rollout.weight_update import WeightUpdates
from megatron_async_rl.storage import snapshots
from megatron_async_rl.storage.snapshots import SnapshotManifest


class Engine:
    """Replaces the engine client: answers every call and records an update's calls in order."""

    def __init__(self, *version: int) -> None:
        self.version = version
        self.asked: list[str] = []
        self.serves = 3  # the version of the weights
        self.broken = asyncio.Event()  # of the broadcast, while it is awaited
        self.loading = asyncio.Event()
        self.waits = False

    async def pause(self, mode: str) -> None:
        self.asked.append(f"pause {mode}")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def abort_all(self) -> None:
        self.asked.append("abort all")

    async def begin_update(self) -> None: ...

    async def end_update(self) -> None: ...

    async def receive_bucket(
        self, group: str, bucket: Bucket, flattened: bool, version: int | None, flush: bool = False
    ) -> None:
        self.asked.append("bucket and flush" if flush else "bucket")
        if self.waits:
            await self.broken.wait()
            raise EngineError("connection closed")

    async def flush_cache(self, patience_s: float) -> None:
        self.asked.append("flush")

    async def load_folder(self, folder: Path, version: int, flush: bool, timeout_s: float) -> None:
        self.asked.append("load")
        self.loading.set()
        self.serves = version
        if self.waits:
            await self.broken.wait()

    async def checksums(self) -> dict[str, str]:
        return {"0:w": "ab"}

    async def served_version(self) -> str:
        return str(self.serves)


def buckets_of(version: int, num_buckets: int = 1) -> ReceiveBuckets:
    return ReceiveBuckets(version, [StageBuckets("g", [Bucket([])] * num_buckets)], verify=False)


def calls_of_an_update(num_buckets: int, **weights: str) -> list[str]:
    """Returns the engine calls of one update without comparison of digests."""

    async def update() -> list[str]:
        engine, gate = Engine(0, 5, 21), Gate()
        updates = WeightUpdates(make_config(Path("m"), Path("r"), **weights), Sent(), engine, gate)  # type: ignore[arg-type]
        await updates.handle(UpdateWeights(3))
        received = updates.handle(buckets_of(3, num_buckets))
        updates.deliver(WeightDigests(3, {}))
        await received
        assert gate.is_open
        return engine.asked

    return asyncio.run(update())


def test_prefix_cache_is_flushed_with_the_last_bucket_if_idle() -> None:
    """A flush while a request runs kills the engine.

    In abort mode all requests have ended after a few engine calls.
    """
    assert calls_of_an_update(1) == ["bucket", "flush"]
    assert calls_of_an_update(2) == ["bucket", "bucket", "flush"]
    assert calls_of_an_update(3) == ["bucket", "bucket", "bucket and flush"]
    assert calls_of_an_update(1, interrupt="retract") == [
        "pause retract",
        "bucket and flush",
        "resume",
    ]
    assert calls_of_an_update(3, kv_cache="keep") == [
        "pause in_place",
        "bucket",
        "bucket",
        "bucket",
        "resume",
    ]


def run_updates(scenario: Any, **weights: Any) -> list[Any]:
    """Returns the worker's messages in `scenario(updates, engine, gate)`, which may take 5 s."""

    async def run() -> list[Any]:
        engine, gate, sent = Engine(0, 5, 21), Gate(), Sent()
        updates = WeightUpdates(make_config(Path("m"), Path("r"), **weights), sent, engine, gate)  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            await scenario(updates, engine, gate)
        return sent.messages

    return asyncio.run(run())


async def settled(task: asyncio.Task[None]) -> None:
    """Returns when the task has ended or waits for something other than the event loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_update_of_a_lost_controller_takes_no_verdict_of_the_next_one() -> None:
    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        await updates.handle(UpdateWeights(3))
        lost = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(lost)  # its controller is killed before it sends digests
        await updates.handle(UpdateWeights(3))
        received = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(received)
        assert lost.cancelled() and not gate.is_open
        updates.deliver(WeightDigests(3, {}))
        await received
        engine.serves = 4
        await updates.handle(UpdateWeights(4))
        received = asyncio.create_task(updates.handle(buckets_of(4)))
        await settled(received)
        updates.deliver(WeightDigests(4, {}))
        await received

    sent = run_updates(scenario)
    assert [type(message) for message in sent] == [
        UpdateReady, UpdateReady, Updated, UpdateReady, Updated,
    ]  # fmt: skip
    assert [m.version for m in sent if isinstance(m, Updated) and not m.error] == [3, 4]


def test_verdict_on_a_failed_attempt_does_not_end_the_next_one() -> None:
    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        await updates.handle(UpdateWeights(3))
        engine.waits = True
        received = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(received)
        updates.deliver(AbandonUpdate(3))  # a source failed, and this server fails with it
        engine.broken.set()
        await received
        engine.waits = False
        received = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(received)
        updates.deliver(WeightDigests(3, {}))
        await received

    ready, failed, updated = run_updates(scenario)
    assert isinstance(ready, UpdateReady)
    assert isinstance(failed, Updated) and "connection closed" in failed.error
    assert isinstance(updated, Updated) and not updated.error


def test_new_step_waits_for_the_engine_and_an_old_one_reports_nothing() -> None:
    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        await updates.handle(UpdateWeights(3))
        engine.waits = True
        lost = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(lost)
        await updates.handle(UpdateWeights(3))
        received = asyncio.create_task(updates.handle(buckets_of(3)))
        await settled(received)
        assert engine.asked.count("bucket") == 1
        engine.waits = False
        engine.broken.set()  # its source opened a new group
        await lost
        await settled(received)
        updates.deliver(WeightDigests(3, {}))
        await received

    sent = run_updates(scenario)
    assert [type(message) for message in sent] == [UpdateReady, UpdateReady, Updated]
    assert not sent[-1].error


@pytest.mark.parametrize("loads", [False, True])
def test_snapshot_of_an_earlier_controller_opens_no_gate_for_an_update(
    tmp_path: Path, loads: bool
) -> None:
    """The controller restarted while this server verified the files, or loaded them."""
    (tmp_path / "config.json").write_text("{}")
    manifest = SnapshotManifest(2, {}, 1, "sha256", {"0:w": "ab"})
    snapshot = snapshots.commit(snapshots.begin(tmp_path, 2), [], manifest, tmp_path)

    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        gate.open()
        engine.waits = loads
        late = asyncio.create_task(updates.handle(LoadSnapshot(2, str(snapshot.path))))
        if loads:
            await engine.loading.wait()
        await settled(late)
        await updates.handle(UpdateWeights(3))
        engine.broken.set()
        await late
        assert not gate.is_open
        assert engine.asked == (["load", "flush"] if loads else [])

    assert [type(message) for message in run_updates(scenario)] == [UpdateReady]


def test_finish_lets_running_requests_end_and_holds_new_ones_back() -> None:
    order: list[str] = []

    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        gate.open()
        end = asyncio.Event()

        async def request(name: str) -> None:
            async with gate.request():
                order.append(f"{name} starts")
                await end.wait()
                order.append(f"{name} ends")

        running = asyncio.create_task(request("old"))
        await settled(running)
        update = asyncio.create_task(updates.handle(UpdateWeights(3)))
        await settled(update)
        waiting = asyncio.create_task(request("new"))
        await settled(waiting)
        assert order == ["old starts"] and not update.done()
        end.set()
        await update
        order.append("update begins")
        received = updates.handle(buckets_of(3))
        updates.deliver(WeightDigests(3, {}))
        await received
        order.append("update ends")
        await asyncio.gather(running, waiting)
        assert engine.asked == ["bucket", "flush"]  # and no abort

    ready, updated = run_updates(scenario, interrupt="finish")
    assert order == [
        "old starts", "old ends", "update begins", "update ends", "new starts", "new ends",
    ]  # fmt: skip
    assert "drain" in ready.seconds and updated.num_interrupted == 0


def test_finish_names_its_settings_when_requests_do_not_end_in_time() -> None:
    async def scenario(updates: WeightUpdates, engine: Engine, gate: Gate) -> None:
        gate.open()
        async with gate.request():
            await updates.handle(UpdateWeights(3))
        assert not gate.is_open

    [updated] = run_updates(scenario, interrupt="finish", update_timeout_s=0.1)
    assert updated.error.startswith(
        "with weights.interrupt = finish 1 requests did not end within 0.9 of "
        "weights.update_timeout_s = 0.1; set it to more than"
    )


def test_request_that_waited_does_not_pass_a_gate_that_was_closed_again() -> None:
    async def scenario() -> None:
        gate = Gate()

        async def request() -> None:
            async with gate.request():
                pass

        task = asyncio.create_task(request())
        await settled(task)
        gate.open()
        gate.close()
        await settled(task)
        assert not task.done() and not gate.num_in_flight
        gate.open()
        await task

    asyncio.run(scenario())


def interruption_of(version: tuple[int, ...], **weights: str) -> Any:
    return make_interruption(make_config(Path("m"), Path("r"), **weights), Engine(*version), Gate())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "weights",
    [{"interrupt": "retract"}, {"kv_cache": "keep"}, {"quantization": "fp8_block"}],
    ids=str,
)
@pytest.mark.parametrize("version", ["0.5.16", "0.5.17.post2", "0.5.20"])
def test_engine_too_old_for_a_setting_is_rejected(version: str, weights: dict[str, str]) -> None:
    config, found = make_config(Path("m"), Path("r"), **weights), engine_versions.parsed(version)
    [(key, value)] = weights.items()
    with pytest.raises(
        ConfigError,
        match=rf"weights\.{key} = {value} needs SGLang 0\.5\.21 .* this is {version[:6]}",
    ):
        engine_versions.check(config, found)
    engine_versions.check(config, (0, 5, 21))
    engine_versions.check(make_config(Path("m"), Path("r")), found)


@pytest.mark.parametrize("version", ["0.5.21", "0.5.22.post1", "0.5.22rc1", "0.5.23+cu129"])
def test_version_of_an_engine_may_have_a_suffix(version: str) -> None:
    assert engine_versions.parsed(version) == tuple(map(int, version[:6].split(".")))


def test_abort_and_finish_work_with_any_engine_and_newer_ones_pause() -> None:
    assert isinstance(interruption_of((0, 5, 16)), Abort)
    assert isinstance(interruption_of((0, 5, 16), interrupt="finish"), Finish)
    assert isinstance(interruption_of((0, 5, 21), interrupt="retract"), Pause)
    assert isinstance(interruption_of((0, 5, 23), kv_cache="keep"), Pause)


def test_kept_cache_gets_a_new_key_with_every_update() -> None:
    """The key is per update: a run resumed from a checkpoint has other weights of equal version."""

    async def keys(mode: Any) -> list[str | None]:
        pause, seen = Pause(Engine(0, 5, 21), mode), []  # type: ignore[arg-type]
        for _ in range(3):
            await pause.stop()
            await pause.resume()
            seen.append(pause.cache_key())
        return seen

    assert len(set(asyncio.run(keys("in_place")))) == 3
    assert asyncio.run(keys("retract")) == [None] * 3
