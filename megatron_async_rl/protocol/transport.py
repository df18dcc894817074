"""The only file that imports zmq: one ROUTER (the controller's Hub), everyone else a DEALER (Link).

Every socket is CURVE-authenticated: the run's folder holds the hub's key pair and one for the run's workers, files of
mode 0600, made anew for each run. The hub writes its address beside them once it listens; workers wait for that file,
so no port is chosen before it is bound.

A controller that dies comes back under the same address and keys, so the workers' sockets find it by themselves. It
knows none of them: it answers their first message by SayHello, and they say hello again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from megatron_async_rl import __version__, addresses
from megatron_async_rl.errors import ConfigError, ProtocolError
from megatron_async_rl.protocol.messages import (
    AnyMessage,
    CheckpointSaved,
    GetBatch,
    Heartbeat,
    Hello,
    Message,
    Published,
    PublishOffer,
    Refused,
    RejoinRequest,
    Shutdown,
    StepDone,
    TrainBatch,
    Welcome,
)
from megatron_async_rl.protocol.wire import SCHEMA, Codec, UnknownHello, read_unknown_hello

MAX_FRAME_BYTES = 1 << 30  # a larger frame closes the connection that sent it
MAX_IN_A_ROW = 16  # messages taken in before other coroutines get their turn
LINGER_MS = 2000  # what is queued at close has this long to leave
REBIND_S = 30.0  # an earlier life's port must be free by then
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def with_versions(hello: Hello) -> Hello:
    """Says which messages this end speaks: the controller refuses others."""
    return msgspec.structs.replace(hello, package=__version__, schema=SCHEMA)


class Peer(bytes):
    """Who sent a message: the identity of a worker's socket, new at every start of that worker."""


class Hub:
    """The controller's end: receives from all workers, sends to each by its Peer."""

    def __init__(self, run_dir: Path, host: str = "127.0.0.1") -> None:
        if host not in LOOPBACK and not has_curve():
            raise ConfigError(
                f"the controller does not listen on {host} without CURVE: this build of libzmq has none; install pyzmq's "
                "own wheel, or run on one host"
            )
        before = run_dir / "controller.address"
        port = int(before.read_text().rsplit(":", 1)[1]) if before.exists() else 0
        keys = run_dir / "keys" if port else _make_keys(run_dir)
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(keys / "allowed"))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.auth.load_certificate(
            keys / "hub.key_secret"
        )
        self._socket.curve_server = True
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(
            zmq.SNDHWM, 0
        )  # what is in flight is bounded by leases and batches, not by dropping
        _keep_alive(self._socket)
        self._plain = zmq.Socket.shadow(self._socket)  # the same socket, to be read without waiting
        self._in_a_row = 0
        self._codec = Codec()
        self.num_malformed = 0
        if port:
            self._bind_again(f"tcp://{host}:{port}")
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
            _write_atomic(before, f"tcp://{host}:{port}\n")

    async def receive(self) -> tuple[Peer, AnyMessage | UnknownHello]:
        """The next well-formed message, or a Hello of another version; malformed ones are counted and dropped."""
        while True:
            peer, *frames = await self._receive()
            buffers = [frame.buffer for frame in frames]
            try:
                return Peer(peer.bytes), self._codec.decode(buffers)
            except ProtocolError:
                self.num_malformed += 1
                if buffers and (stranger := read_unknown_hello(buffers[0])):
                    return Peer(peer.bytes), stranger

    async def _receive(self) -> list[zmq.Frame]:
        """What has come is taken without asyncio's machinery, which costs more than the message; others get their turn."""
        self._in_a_row += 1
        if self._in_a_row > MAX_IN_A_ROW:
            self._in_a_row = 0
            await asyncio.sleep(0)
        try:
            frames = [self._plain.recv(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            self._in_a_row = 0
            return await self._socket.recv_multipart(copy=False)
        while frames[-1].more:  # the rest of a message comes with its first frame
            frames.append(self._plain.recv(copy=False))
        return frames

    async def send(self, peer: Peer, message: Message) -> bool:
        """False where that worker is no longer connected: the caller learns of the loss by its missing heartbeat."""
        try:
            await self._socket.send_multipart([peer, *self._codec.encode(message)], copy=False)
        except zmq.ZMQError as e:
            if e.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def _bind_again(self, address: str) -> None:
        """The address of the life before: its workers know no other."""
        deadline = time.monotonic() + REBIND_S
        while True:
            try:
                self._socket.bind(address)
                return
            except zmq.ZMQError as e:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{address}, this run's address, is taken: {e.strerror}; stop whoever listens there, or remove "
                        "controller.address from run.dir and start all workers anew"
                    ) from None
                time.sleep(0.1)

    def close(self) -> None:
        self._authenticator.stop()
        self._socket.close()
        self._context.term()


class Link:
    """A worker's end under asyncio."""

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = _connect(self._context, run_dir, timeout_s)
        self._codec = Codec()

    async def join(self, hello: Hello | Callable[[], Hello], timeout_s: float = 60.0) -> int:
        """Says hello; the controller's epoch. Raises ProtocolError when refused or not answered.

        A callable is asked again whenever the controller wants a new hello: what was leased before it is void.
        """
        self._hello = lambda: with_versions(hello() if callable(hello) else hello)
        await self.send(self._hello())
        try:
            return _epoch(await asyncio.wait_for(self._receive(), timeout_s))
        except TimeoutError:
            raise ProtocolError(f"the controller did not answer within {timeout_s:.0f} s") from None

    async def receive(self) -> AnyMessage:
        """The next message that is not about joining again, which is done here."""
        while True:
            message = await self._receive()
            if isinstance(message, RejoinRequest):
                await self.send(self._hello())
            elif isinstance(message, Refused):
                raise _refused(message)
            elif not isinstance(message, Welcome):
                return message

    async def _receive(self) -> AnyMessage:
        return self._codec.decode(await self._socket.recv_multipart())

    async def send(self, message: Message) -> None:
        await self._socket.send_multipart(self._codec.encode(message), copy=False)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class SyncLink:
    """A worker's end for code that blocks: the trainer.

    What it has reported or asked since the last answer is said again to a new life of the controller; both ends take
    it twice without harm.
    """

    ended: Shutdown | None = None  # the run is over, whoever received that

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        self._context = zmq.Context()
        self._socket = _connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._controller = (run_dir / "controller.address").read_text().strip()
        self._hello: Hello | None = None
        self._unanswered: list[Message] = []

    @property
    def own_address(self) -> str:
        """This host's address on the way to the controller: loopback where that is on this host."""
        return addresses.own_address(self._controller)

    def join(self, hello: Hello, timeout_s: float = 60.0) -> int:
        hello = with_versions(hello)
        self.send(hello)
        try:
            epoch = _epoch(self._receive(timeout_s))
        except TimeoutError as e:
            raise ProtocolError(str(e)) from None
        self._hello = hello
        return epoch

    def receive(self, timeout_s: float) -> AnyMessage:
        """The next message that is not about joining again, which is done here. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                message = self._receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._send(Heartbeat())  # a new life of the controller learns of us by it
                raise
            if isinstance(message, RejoinRequest) and self._hello is not None:
                for again in (self._hello, *self._unanswered):
                    self._send(again)
            elif isinstance(message, Refused):
                raise _refused(message)
            elif not isinstance(message, Welcome):
                break
        if isinstance(message, TrainBatch | Published | Shutdown):
            self._unanswered.clear()
        if isinstance(message, Shutdown):
            self.ended = message
        return message

    def send(self, message: Message) -> None:
        if isinstance(message, GetBatch | PublishOffer | StepDone | CheckpointSaved):
            self._unanswered.append(message)
        self._send(message)

    def _receive(self, timeout_s: float) -> AnyMessage:
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"no message from the controller within {timeout_s:.0f} s")
        return self._codec.decode(self._socket.recv_multipart())

    def _send(self, message: Message) -> None:
        self._socket.send_multipart(self._codec.encode(message), copy=False)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now, for servers that must be told one; their start is retried on a lost race."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _epoch(answer: AnyMessage) -> int:
    if isinstance(answer, Refused):
        raise _refused(answer)
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"expected Welcome from the controller, got {type(answer).__name__}")
    return answer.epoch


def _refused(answer: Refused) -> ProtocolError:
    return ProtocolError(f"the controller refused this worker: {answer.reason}")


def _connect(context: zmq.Context, run_dir: Path, timeout_s: float) -> zmq.Socket:
    deadline = time.monotonic() + timeout_s
    address = run_dir / "controller.address"
    while not address.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no controller wrote {address} within {timeout_s:.0f} s; is it running, with this run.dir?"
            )
        time.sleep(0.05)
    keys = run_dir / "keys"
    sock = context.socket(zmq.DEALER)
    sock.curve_publickey, sock.curve_secretkey = zmq.auth.load_certificate(
        keys / "worker.key_secret"
    )
    sock.curve_serverkey, _ = zmq.auth.load_certificate(keys / "hub.key")
    sock.setsockopt(zmq.IDENTITY, secrets.token_bytes(8))
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    _keep_alive(sock)
    sock.connect(address.read_text().strip())
    return sock


def _keep_alive(sock: zmq.Socket) -> None:
    """The kernel notices a host that is gone within a minute, and both ends connect anew."""
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 30),
        (zmq.TCP_KEEPALIVE_INTVL, 10),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        sock.setsockopt(option, value)


def _make_keys(run_dir: Path) -> Path:
    """Key pairs for this run: hub and workers; only the workers' public key is on the allow-list."""
    keys = run_dir / "keys"
    (keys / "allowed").mkdir(mode=0o700, parents=True, exist_ok=True)
    keys.chmod(0o700)
    previous_umask = os.umask(0o077)
    try:
        zmq.auth.create_certificates(keys, "hub")
        public, _ = zmq.auth.create_certificates(keys, "worker")
        _write_atomic(keys / "allowed" / "worker.key", Path(public).read_text())
    finally:
        os.umask(previous_umask)
    return keys


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def has_curve() -> bool:
    """Whether this build of libzmq can encrypt and authenticate."""
    return bool(zmq.has("curve"))
