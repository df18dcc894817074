"""Weight updates with real trainer ranks (weights_main.py) and receivers (weights_receiver.py).

The test holds the controller's end: it accepts every process and drives the updates one by one.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_shapes import NUM_RANKS, UPDATE_TIMEOUT_S
from paths import SUPPORT, python_environment

from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.controller.weight_sync.snapshot import TrainerPublisher
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import Hello, Message, Shutdown, Welcome
from megatron_async_rl.protocol.weight_messages import (
    BucketsSent,
    GroupJoined,
    GroupOpened,
    PublishOffer,
    SnapshotWritten,
    Updated,
    UpdateReady,
)


@dataclass
class WeightController:
    """The controller's end of all connections."""

    hub: Hub
    peers: dict[str, Peer] = field(default_factory=dict)
    offers: dict[str, PublishOffer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.publisher: BroadcastPublisher | TrainerPublisher = BroadcastPublisher(
            UpdateSession(self.send, UPDATE_TIMEOUT_S), 1, verify_every=1
        )
        self.changed = asyncio.Condition()
        self.num_buckets = 0

    async def send(self, name: str, message: Message) -> None:
        await self.hub.send(self.peers[name], message)

    async def receive(self) -> None:
        while True:
            peer, message = await self.hub.receive()
            name = next((n for n, p in self.peers.items() if p == peer), "")
            if isinstance(message, Hello):
                self.peers[message.name] = peer
                self.publisher.forget_groups()
                await self.hub.send(peer, Welcome(0))
            elif isinstance(message, PublishOffer):
                self.offers[name] = message
            elif isinstance(
                message,
                UpdateReady | GroupOpened | GroupJoined | BucketsSent | SnapshotWritten | Updated,
            ):
                self.publisher.session.inbox.put_nowait((name, message))
            async with self.changed:
                self.changed.notify_all()

    async def wait_for(self, condition: Any) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(condition), 100)

    async def publish(self, version: int, servers: list[str]) -> tuple[Outcome, float]:
        """Waits for the offers of all sources, runs one update; returns its outcome and seconds."""
        await self.wait_for(lambda: self._all_offer(version))
        offers, self.offers = self.offers, {}
        self.num_buckets = sum(len(offer.buckets) for offer in offers.values())
        by_source = sorted(offers.values(), key=lambda offer: offer.source)
        self.senders = [
            [spec.name for bucket in offer.buckets for spec in bucket.tensors]
            for offer in by_source
        ]
        started = time.monotonic()
        outcome = await self.publisher.publish(version, offers, servers)
        return outcome, time.monotonic() - started

    def _all_offer(self, version: int) -> bool:
        mine = [offer for offer in self.offers.values() if offer.version == version]
        return bool(mine) and len(mine) == mine[0].num_sources


@contextmanager
def weight_processes(
    folder: Path,
    work: list[dict[str, Any]],
    receivers: dict[str, list[str]],
    num_ranks: int = NUM_RANKS,
) -> Iterator[None]:
    """Runs the ranks over `work` and the receivers, each with the behaviors of its incarnations.

    Fails if the ranks do not end with exit code 0 after the block.
    """
    (folder / "keys").mkdir(mode=0o700)
    (folder / "work.json").write_text(json.dumps(work))
    environment = python_environment(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node".split()]
    commands = [[*torchrun, str(num_ranks), str(SUPPORT / "weights_main.py"), str(folder)]]
    commands += [
        [sys.executable, str(SUPPORT / "weights_receiver.py"), str(folder), name, *behaviors]
        for name, behaviors in receivers.items()
    ]
    children = []
    try:
        for number, command in enumerate(commands):
            log = (folder / f"process-{number}.log").open("w")
            children.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
        yield
        assert children[0].wait(60) == 0, (folder / "process-0.log").read_text()[-6000:]
    except BaseException:
        print((folder / "process-0.log").read_text()[-6000:])
        raise
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, 15)
        for child in children:
            child.wait(20)


async def drive_updates(folder: Path, body: Any) -> Any:
    """Awaits `body(controller)`, then tells every process to shut down."""
    hub = Hub(folder)
    control = WeightController(hub)
    loop = asyncio.create_task(control.receive())
    try:
        return await body(control)
    finally:
        for peer in control.peers.values():
            await hub.send(peer, Shutdown("over"))
        loop.cancel()
        hub.close()
