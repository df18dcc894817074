"""The controller's place in benchmarks of weight updates, and variables of their processes."""

from __future__ import annotations

import asyncio
from math import prod
from pathlib import Path
from typing import Any

from megatron_async_rl import processes
from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome
from megatron_async_rl.controller.weight_sync.snapshot import TrainerPublisher
from megatron_async_rl.errors import Error
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.messages import Failed, Hello, Message, Shutdown, Welcome
from megatron_async_rl.protocol.weight_messages import PublishOffer, WeightMessage

ITEM_BYTES = {"float32": 4, "float8_e4m3fn": 1}
OFFER_TIMEOUT_S = 360.0


class Control:
    """Accepts workers and a trainer and hands their messages on; run `receive` as a task."""

    def __init__(self, folder: Path) -> None:
        self._hub = Hub(folder)
        self._peers: dict[str, Peer] = {}
        self._joined = asyncio.Condition()
        self._offers: asyncio.Queue[tuple[str, PublishOffer]] = asyncio.Queue()
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()  # of the running update

    async def wait_for(self, name: str, timeout_s: float) -> None:
        """Waits until this process has joined."""
        async with self._joined:
            joined = self._joined.wait_for(lambda: name in self._peers)
            await asyncio.wait_for(joined, timeout_s)

    async def send(self, name: str, message: Message) -> None:
        await self._hub.send(self._peers[name], message)

    async def publish(
        self, publisher: BroadcastPublisher | TrainerPublisher, version: int, server: str
    ) -> tuple[Outcome, PublishOffer]:
        """Waits for the trainer's offer and sends it to a server."""
        source, offer = await asyncio.wait_for(self._offers.get(), OFFER_TIMEOUT_S)
        self._inbox = publisher.session.inbox
        return await publisher.publish(version, {source: offer}, [server]), offer

    async def receive(self) -> None:
        while True:
            peer, message = await self._hub.receive()
            name = next((n for n, p in self._peers.items() if p == peer), "")
            if isinstance(message, Hello):
                self._peers[message.name] = peer
                await self._hub.send(peer, Welcome(0))
                print(f"{message.name} joined", flush=True)
                async with self._joined:
                    self._joined.notify_all()
            elif isinstance(message, PublishOffer):
                self._offers.put_nowait((name, message))
            elif isinstance(message, WeightMessage):
                self._inbox.put_nowait((name, message))
            else:
                await self.handle(name, message)

    async def handle(self, name: str, message: Message) -> None:
        """Receives the messages that belong to no weight update."""
        if isinstance(message, Failed):
            raise Error(f"{name}: {message.error}")

    async def close(self) -> None:
        """Tells all that the benchmark is over."""
        for name in self._peers:
            await self.send(name, Shutdown("the benchmark is over"))
        self._hub.close()


def environment(gpus: str | None) -> dict[str, str]:
    """Returns the variables of a process; `gpus`: None on a CPU."""
    variables = {
        "NCCL_CUMEM_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
        "PYTHONPATH": processes.python_path(),
        "PYTHONUNBUFFERED": "1",
    }
    return variables if gpus is None else variables | {"CUDA_VISIBLE_DEVICES": gpus}


def of_rank(rank: int, world: int, port: int) -> dict[str, str]:
    """Returns the variables by which trainer ranks find each other."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in numbers.items()}


def num_bytes(offer: PublishOffer) -> int:
    """Returns the bytes of an update."""
    tensors = [tensor for bucket in offer.buckets for tensor in bucket.tensors]
    return sum(prod(t.shape) * ITEM_BYTES.get(t.dtype, 2) for t in tensors)
