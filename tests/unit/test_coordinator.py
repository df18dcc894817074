"""Interrupt modes of a weight update and the calls that they make, with a fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from update_parts import Sent, make_config

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.protocol.messages import (
    Bucket,
    ReceiveBuckets,
    StageBuckets,
    UpdateWeights,
    WeightDigests,
)
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.interruption import Abort, Pause, make_interruption
from megatron_async_rl.rollout.weight_update import WeightUpdates


class Engine:
    """Replaces the engine client: answers every call and records an update's calls in order."""

    def __init__(self, *version: int) -> None:
        self.version = version
        self.asked: list[str] = []

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

    async def flush_cache(self, patience_s: float) -> None:
        self.asked.append("flush")

    async def served_version(self) -> str:
        return "3"


def calls_of_an_update(num_buckets: int, **weights: str) -> list[str]:
    """Returns the engine calls of one update without comparison of digests."""

    async def update() -> list[str]:
        engine, gate = Engine(0, 5, 21), Gate()
        updates = WeightUpdates(make_config(Path("m"), Path("r"), **weights), Sent(), engine, gate)  # type: ignore[arg-type]
        await updates.handle(UpdateWeights(3))
        updates.deliver(WeightDigests(3, {}))
        await updates.handle(
            ReceiveBuckets(3, [StageBuckets("g", [Bucket([])] * num_buckets)], verify=False)
        )
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


def interruption_of(version: tuple[int, ...], **weights: str) -> Any:
    return make_interruption(make_config(Path("m"), Path("r"), **weights), Engine(*version), Gate())  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [{"interrupt": "retract"}, {"kv_cache": "keep"}], ids=str)
@pytest.mark.parametrize("version", [(0, 5, 16), (0, 5, 17), (0, 5, 20)])
def test_engine_too_old_for_interrupt_mode_is_rejected(
    version: tuple[int, ...], weights: dict[str, str]
) -> None:
    [(key, value)] = weights.items()
    with pytest.raises(
        ConfigError,
        match=rf"weights\.{key} = {value} needs SGLang 0\.5\.21 .* this is 0\.5\.{version[2]}",
    ):
        interruption_of(version, **weights)


def test_abort_works_with_any_engine_and_newer_ones_pause() -> None:
    assert isinstance(interruption_of((0, 5, 16)), Abort)
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
