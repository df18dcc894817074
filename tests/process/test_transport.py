"""Only workers with the keys of the run reach the hub, and their messages are checked."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.asyncio
import zmq.auth
from paths import python_environment

from megatron_async_rl.addresses import free_port
from megatron_async_rl.errors import ConfigError, ProtocolError
from megatron_async_rl.protocol import hub as hub_module
from megatron_async_rl.protocol import sockets, sync_link
from megatron_async_rl.protocol.hub import Hub, Peer
from megatron_async_rl.protocol.link import Link, with_versions
from megatron_async_rl.protocol.messages import (
    Failed,
    GetBatch,
    Heartbeat,
    Hello,
    Refused,
    RejoinRequest,
    Shutdown,
    TrainBatch,
    Welcome,
)
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.protocol.weight_messages import Published, PublishOffer
from megatron_async_rl.protocol.wire import Codec, Malformed

TIMEOUT_S = 60.0
HELLO = Hello(role="reward", name="reward-0", pid=1)


def run_with_hub(run_dir: Path, test: Callable[[Hub], Awaitable[None]]) -> None:
    async def body() -> None:
        hub = Hub(run_dir)
        try:
            await asyncio.wait_for(test(hub), TIMEOUT_S)
        finally:
            hub.close()

    asyncio.run(body())


async def welcome(hub: Hub, epoch: int = 3) -> Peer:
    peer, hello = await hub.receive()
    assert isinstance(hello, Hello)
    assert await hub.send(peer, Welcome(epoch=epoch))
    return peer


def connect_with_keys(
    context: zmq.asyncio.Context,
    run_dir: Path,
    keys: tuple[bytes, bytes] | None,
    server: bytes | None = None,
) -> zmq.asyncio.Socket:
    """Connects to the hub with the given keys, or without any."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys
        socket.curve_serverkey = (
            server or zmq.auth.load_certificate(run_dir / "keys" / "hub.key")[0]
        )
    socket.connect((run_dir / "controller.address").read_text().strip())
    return socket


def test_worker_joins_and_messages_pass_both_ways(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        link = Link(tmp_path)
        peer, epoch = await asyncio.gather(welcome(hub), link.join(HELLO))
        assert epoch == 3
        await link.send(Heartbeat(running=5))
        assert await hub.receive() == (peer, Heartbeat(running=5))
        await hub.send(peer, Shutdown(reason="done"))
        assert await link.receive() == Shutdown(reason="done")
        link.close()

    run_with_hub(tmp_path, test)


def test_arrays_arrive_at_a_blocking_worker(tmp_path: Path) -> None:
    ids, zeros = np.arange(100_000, dtype=np.int32), np.zeros(100_000, np.float32)
    batch = TrainBatch(
        version=1, samples=[TrainSample(ids=ids, logprobs=zeros, versions=ids, advantages=zeros)]
    )

    def train() -> np.ndarray:
        link = SyncLink(tmp_path)
        try:
            assert link.join(HELLO, TIMEOUT_S) == 3
            received = link.receive(TIMEOUT_S)
            assert isinstance(received, TrainBatch)
            return received.samples[0].ids
        finally:
            link.close()

    async def test(hub: Hub) -> None:
        trainer = asyncio.create_task(asyncio.to_thread(train))
        await hub.send(await welcome(hub), batch)
        assert np.array_equal(await trainer, ids)

    run_with_hub(tmp_path, test)


@pytest.mark.parametrize(
    "who", ["no keys", "keys of its own", "keys of another run", "the hub's key alone"]
)
def test_socket_without_the_keys_of_the_run_delivers_nothing(tmp_path: Path, who: str) -> None:
    other = tmp_path / "other"
    other.mkdir()

    async def test(hub: Hub) -> None:
        if who == "keys of another run":
            Hub(other).close()
        keys = {
            "no keys": lambda: None,
            "keys of its own": zmq.curve_keypair,
            "keys of another run": lambda: zmq.auth.load_certificate(
                other / "keys" / "worker.key_secret"
            ),
            "the hub's key alone": lambda: (
                zmq.auth.load_certificate(tmp_path / "keys" / "hub.key")[0],
                zmq.curve_keypair()[1],
            ),
        }[who]()
        context = zmq.asyncio.Context()
        socket = connect_with_keys(context, tmp_path, keys)
        await socket.send_multipart(Codec().encode(HELLO))
        await asyncio.sleep(0.3)  # the connect_with_keys's message is sent first
        link = Link(tmp_path)
        joining = asyncio.create_task(link.join(Hello(role="rollout", name="ours", pid=2)))
        peer, message = await hub.receive()
        assert message == with_versions(Hello(role="rollout", name="ours", pid=2))
        await hub.send(peer, Welcome(epoch=0))
        await joining
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hub.receive(), 0.3)
        assert hub.num_malformed == 0
        socket.close()
        context.term()
        link.close()

    run_with_hub(tmp_path, test)


def test_burst_of_messages_arrives_complete_and_blocks_no_task(tmp_path: Path) -> None:
    count = 300
    body = np.arange(5_000, dtype=np.int32)
    zeros = np.zeros(len(body), np.float32)

    async def test(hub: Hub) -> None:
        links = [Link(tmp_path) for _ in range(2)]
        for link in links:
            joining = asyncio.create_task(link.join(HELLO))
            await welcome(hub)
            await joining

        async def flood(link: Link) -> None:
            for number in range(count):
                await link.send(
                    TrainBatch(
                        number, [TrainSample(body + number, zeros, body, zeros)][: number % 2]
                    )
                )
            await asyncio.sleep(
                0.2
            )  # a message after a pause, when the socket has been empty, arrives too
            await link.send(Heartbeat())

        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        senders = [asyncio.create_task(flood(link)) for link in links]
        beside = asyncio.create_task(other())
        got: dict[Peer, list[int]] = {}
        ended = 0
        while ended < len(links):
            peer, message = await hub.receive()
            if isinstance(message, Heartbeat):
                ended += 1
                continue
            assert isinstance(message, TrainBatch) and len(message.samples) == message.version % 2
            assert all(
                np.array_equal(sample.ids, body + message.version) for sample in message.samples
            )
            got.setdefault(peer, []).append(message.version)
        assert list(got.values()) == [list(range(count))] * 2
        assert turns >= 2 * count / hub_module.MAX_IN_A_ROW and hub.num_malformed == 0
        beside.cancel()
        await asyncio.gather(*senders)
        for link in links:
            link.close()

    run_with_hub(tmp_path, test)


def test_malformed_message_is_counted_and_reported_with_its_sender(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        context = zmq.asyncio.Context()
        socket = connect_with_keys(
            context, tmp_path, zmq.auth.load_certificate(tmp_path / "keys" / "worker.key_secret")
        )
        await socket.send_multipart([b"\x80\x04\x95."])
        await socket.send_multipart([b"", b"", b""])
        await socket.send_multipart(Codec().encode(Heartbeat(running=1)))
        senders = set()
        for _ in range(2):
            sender, message = await hub.receive()
            assert isinstance(message, Malformed) and "a malformed message" in message.reason
            senders.add(sender)
        sender, message = await hub.receive()
        assert (message, hub.num_malformed) == (Heartbeat(running=1), 2)
        assert senders == {sender}
        socket.close()
        context.term()

    run_with_hub(tmp_path, test)


def test_oversized_frame_disconnects_only_its_sender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_FRAME_BYTES", 1 << 16)

    async def test(hub: Hub) -> None:
        link = Link(tmp_path)
        joining = asyncio.create_task(link.join(HELLO))
        await welcome(hub)
        await joining
        context = zmq.asyncio.Context()
        socket = connect_with_keys(
            context, tmp_path, zmq.auth.load_certificate(tmp_path / "keys" / "worker.key_secret")
        )
        await socket.send_multipart(
            Codec().encode(Failed("x" * (1 << 17)))
        )  # well-formed except for its size
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hub.receive(), 0.5)
        await link.send(Heartbeat(running=2))
        _, message = await hub.receive()
        assert message == Heartbeat(running=2)
        socket.close()
        context.term()
        link.close()

    run_with_hub(tmp_path, test)


def test_hub_without_curve_listens_on_loopback_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_hub(host: str) -> int:
        hub = Hub(tmp_path, host)
        try:
            return hub._socket.getsockopt(zmq.MECHANISM)
        finally:
            hub.close()

    for host in ("127.0.0.1", "0.0.0.0"):
        (tmp_path / "controller.address").unlink(missing_ok=True)
        assert asyncio.run(open_hub(host)) == zmq.CURVE
    (tmp_path / "controller.address").unlink()
    monkeypatch.setattr(sockets, "has_curve", lambda: False)
    for host in ("0.0.0.0", "10.0.0.1", "::"):
        with pytest.raises(ConfigError, match=f"run.host = {host}: .* CURVE"):
            asyncio.run(open_hub(host))
    assert not (tmp_path / "controller.address").exists()  # the address was not published


def test_secret_keys_are_private_and_new_for_each_run(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        pass

    run_with_hub(tmp_path, test)
    keys = tmp_path / "keys"
    secrets = [keys / "hub.key_secret", keys / "worker.key_secret"]
    before = [path.read_bytes() for path in secrets]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert sorted(path.name for path in (keys / "allowed").iterdir()) == ["worker.key"]
    assert "secret-key" not in (keys / "allowed" / "worker.key").read_text()
    run_with_hub(tmp_path, test)
    assert all(
        path.read_bytes() == old for path, old in zip(secrets, before, strict=True)
    )  # a restart of the same run
    (tmp_path / "controller.address").unlink()
    run_with_hub(tmp_path, test)
    assert all(path.read_bytes() != old for path, old in zip(secrets, before, strict=True))
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", [Link, SyncLink])
def test_worker_without_controller_names_the_missing_file(tmp_path: Path, kind: type) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"controller\.address.*run\.dir"):
        kind(tmp_path, timeout_s=0.2)
    assert time.monotonic() - started < 30


def test_refused_worker_gets_the_reason(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        link = Link(tmp_path)
        joining = asyncio.create_task(link.join(HELLO))
        peer, _ = await hub.receive()
        await hub.send(peer, Refused(reason="protocol 1 is not 2"))
        with pytest.raises(ProtocolError, match="protocol 1 is not 2"):
            await joining
        link.close()

    run_with_hub(tmp_path, test)


def test_joining_a_silent_controller_raises(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        link = Link(tmp_path)
        with pytest.raises(ProtocolError, match="did not answer"):
            await link.join(HELLO, timeout_s=0.2)
        link.close()

    run_with_hub(tmp_path, test)


def test_sending_to_an_absent_worker_returns_false(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        assert not await hub.send(Peer(b"nobody--"), Shutdown(reason="done"))

    run_with_hub(tmp_path, test)


def test_two_workers_are_distinguished(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        links = [Link(tmp_path) for _ in range(2)]
        peers = {}
        for number, link in enumerate(links):
            joining = asyncio.create_task(link.join(HELLO))
            peers[number] = await welcome(hub, epoch=number)
            assert await joining == number
        assert peers[0] != peers[1]
        for number, link in enumerate(links):
            await hub.send(peers[number], Shutdown(reason=str(number)))
            assert await link.receive() == Shutdown(reason=str(number))
            link.close()

    run_with_hub(tmp_path, test)


def test_free_port_is_unprivileged() -> None:
    assert 1024 <= free_port() < 65536


async def received_in(hub: Hub, seconds: float) -> list[object]:
    found: list[object] = []
    with contextlib.suppress(TimeoutError):
        while True:
            found.append((await asyncio.wait_for(hub.receive(), seconds))[1])
    return found


def test_workers_rejoin_a_restarted_controller_and_repeat_requests(
    tmp_path: Path,
) -> None:
    """They say hello once, however many messages waited for the controller."""

    async def first(hub: Hub) -> None:
        sync, link = SyncLink(tmp_path), Link(tmp_path)
        trainer = Hello("trainer", "trainer-0", 1, leader=0)
        joined = asyncio.create_task(asyncio.to_thread(sync.join, trainer))
        await welcome(hub, 1)
        assert await joined == 1
        hellos = iter([HELLO, Hello("reward", "reward-0", 2), HELLO])
        joining = asyncio.create_task(link.join(lambda: next(hellos)))
        await welcome(hub, 1)
        await joining
        sync.send(GetBatch(4))
        peer, _ = await hub.receive()
        for message in (Published(4, 1), TrainBatch(3, [])):  # which answer another request
            await hub.send(peer, message)
            assert await asyncio.to_thread(sync.receive, 30.0) == message
        first.links = sync, link

    run_with_hub(tmp_path, first)
    address = (tmp_path / "controller.address").read_text()

    async def second(hub: Hub) -> None:
        sync, link = first.links
        for _ in range(3):
            await link.send(Heartbeat())
            sync.send(Heartbeat())
        waiting = asyncio.create_task(asyncio.to_thread(sync.receive, 30.0))
        unknown: dict[Peer, None] = {}
        told: list[object] = []
        receiving = asyncio.create_task(link.receive())
        num_heartbeats = 0
        while num_heartbeats < 6 or len(told) < 3:
            peer, message = await hub.receive()
            if isinstance(message, Heartbeat):
                num_heartbeats += 1
                unknown[peer] = None
                await hub.send(peer, RejoinRequest())
            else:
                told.append(message)
                if isinstance(message, Hello):
                    await hub.send(peer, Welcome(2))
        for peer in unknown:
            await hub.send(peer, Shutdown("over"))
        assert await waiting == await receiving == Shutdown("over")
        told += await received_in(hub, 0.3)
        hello = with_versions(Hello("reward", "reward-0", 2))
        trainer = with_versions(Hello("trainer", "trainer-0", 1, leader=0))
        assert sorted(map(str, told)) == sorted(map(str, [hello, trainer, GetBatch(4)]))
        assert sync.ended == Shutdown("over")
        sync.close()
        link.close()

    run_with_hub(tmp_path, second)
    assert (tmp_path / "controller.address").read_text() == address


def test_request_without_an_answer_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks loses the message under way, and the controller knows the worker."""
    monkeypatch.setattr(sync_link, "RESEND_S", 0.1)

    async def test(hub: Hub) -> None:
        sync = SyncLink(tmp_path)
        trainer = Hello("trainer", "trainer-0", 1, leader=0)
        joined = asyncio.create_task(asyncio.to_thread(sync.join, trainer))
        peer = await welcome(hub)
        await joined
        sync.send(GetBatch(4))
        assert (await hub.receive())[1] == GetBatch(4)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(sync.receive, 0.2)
        assert [(await hub.receive())[1] for _ in range(2)] == [Heartbeat(), GetBatch(4)]
        await hub.send(peer, TrainBatch(4, []))
        assert await asyncio.to_thread(sync.receive, 30.0) == TrainBatch(4, [])
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(sync.receive, 0.2)
        assert [type(m) for m in await received_in(hub, 0.1)] == [Heartbeat]
        sync.close()

    run_with_hub(tmp_path, test)


def test_batch_that_arrives_during_a_weight_update_is_returned_after_it(tmp_path: Path) -> None:
    """The controller restarted after Republish: it gets the request first, then the offer."""

    async def test(hub: Hub) -> None:
        sync = SyncLink(tmp_path)
        trainer = Hello("trainer", "trainer-0", 1, leader=0, stage=0)
        joined = asyncio.create_task(asyncio.to_thread(sync.join, trainer))
        peer = await welcome(hub)
        await joined
        sync.send(GetBatch(4))
        sync.send(PublishOffer(4, 0, 1, [], "gloo"))
        for message in (TrainBatch(4, []), TrainBatch(4, []), Published(4, 1)):
            await hub.send(peer, message)
        for expected in (Published(4, 1), TrainBatch(4, [])):
            assert await asyncio.to_thread(sync.receive, 30.0) == expected
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(sync.receive, 0.1)
        sync.close()

    run_with_hub(tmp_path, test)


LINK_PROGRAM = """
import asyncio, resource, sys
from pathlib import Path

from megatron_async_rl.protocol.link import Link

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 4096)))

async def main():
    link = Link(Path(sys.argv[1]))
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    link.close()

asyncio.run(main())
"""


def test_worker_may_open_as_many_files_as_the_hard_limit_allows(tmp_path: Path) -> None:
    """It has connections for each sample in flight: to the server, and from its agent."""

    async def link_in_a_process(hub: Hub) -> None:
        command = [sys.executable, "-c", LINK_PROGRAM, str(tmp_path)]
        child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await child.communicate()
        assert int(output) == 4096

    run_with_hub(tmp_path, link_in_a_process)


HUB_PROGRAM = """
import asyncio, resource, sys
from pathlib import Path

from megatron_async_rl.protocol import hub
from megatron_async_rl.protocol.hub import Hub
from megatron_async_rl.protocol.messages import Welcome

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, int(sys.argv[2]))))
hub.HANDSHAKE_MS = int(sys.argv[3])

async def main():
    hub = Hub(Path(sys.argv[1]))
    while True:
        peer, _ = await hub.receive()
        await hub.send(peer, Welcome(1))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("num_connections", "hard_limit", "handshake_ms"),
    [
        # long before a handshake deadline
        pytest.param(1500, 4096, 100_000, id="fewer-than-the-process-may-open"),
        # the first handshake deadline makes room for the worker
        pytest.param(600, 512, hub_module.HANDSHAKE_MS, id="more-than-it-may-open"),
    ],
)
def test_worker_joins_in_spite_of_half_open_connections(
    tmp_path: Path, num_connections: int, hard_limit: int, handshake_ms: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < num_connections + 500:
        pytest.skip(f"this test opens {num_connections} sockets, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, num_connections + 500), hard))
    program = [sys.executable, "-c", HUB_PROGRAM, str(tmp_path), str(hard_limit), str(handshake_ms)]
    hub, half_open = subprocess.Popen(program, env=python_environment()), []
    try:
        probe = Link(tmp_path)
        asyncio.run(probe.join(HELLO))
        probe.close()
        address = (tmp_path / "controller.address").read_text().strip().rsplit(":", 1)
        for _ in range(num_connections):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", int(address[1])))
            half_open.append(sock)  # and says nothing
        time.sleep(0.5)

        async def join() -> None:
            link = Link(tmp_path)
            try:
                assert await link.join(HELLO, timeout_s=60) == 1
            finally:
                link.close()

        asyncio.run(join())
        assert hub.poll() is None
    finally:
        for sock in half_open:
            sock.close()
        hub.kill()
        hub.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connection_that_does_not_authenticate_is_closed(tmp_path: Path) -> None:
    async def test(hub: Hub) -> None:
        port = int((tmp_path / "controller.address").read_text().rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.monotonic()
        await asyncio.wait_for(reader.read(), TIMEOUT_S)  # the greeting, then the end
        assert time.monotonic() - started < 25  # zmq's own deadline is 30 s
        writer.close()

    run_with_hub(tmp_path, test)
