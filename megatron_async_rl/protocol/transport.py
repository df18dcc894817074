"""Sockets between controller and workers; no other file imports zmq.

The controller has one ROUTER socket (Hub), every worker a DEALER socket (Link, or SyncLink in code
that blocks). All are CURVE-authenticated with key pairs that run.dir holds (mode 0600, new for each
run): one of the hub, one of the workers. The hub writes its address beside them once it listens;
workers wait for that file, so no port is chosen before it is bound.

A restarted controller has the same address and keys, so workers reconnect by themselves. It knows
none of them: it answers each message that was sent before Hello with RejoinRequest, and a worker
then sends one Hello for all of these.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from megatron_async_rl import __version__, addresses
from megatron_async_rl.errors import ConfigError, Error, ProtocolError
from megatron_async_rl.protocol import messages, weight_messages, wire
from megatron_async_rl.protocol.messages import Hello, Message, Refused
from megatron_async_rl.protocol.wire import (
    SCHEMA,
    AnyMessage,
    Codec,
    Malformed,
    UnknownHello,
    read_unknown_hello,
)
from megatron_async_rl.storage import files

MAX_FRAME_BYTES = 1 << 30  # a larger frame closes the connection that sent it
MAX_IN_A_ROW = 16  # messages received before other coroutines run
LINGER_MS = 2000  # for messages queued at close
HANDSHAKE_MS = 4000  # a connection that has not authenticated by then is closed
BACKLOG = 1024  # connections that the kernel holds until they are accepted
REBIND_S = 30.0  # for an earlier controller's port to become free
JOIN_S = 600.0  # for the answer to the first Hello: the controller may read a long journal
RESEND_S = 120.0  # without an answer; a connection that breaks loses what was under way
REJOIN_S = 10.0  # for the answer to a Hello; until then no second one is sent
_REPEATED = (
    messages.GetBatch, weight_messages.PublishOffer, messages.StepDone, messages.CheckpointSaved
)  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def with_versions(hello: Hello) -> Hello:
    """Adds the package version and message schema, which the controller compares with its own."""
    return msgspec.structs.replace(hello, package=__version__, schema=SCHEMA)


class Peer(bytes):
    """Identity of a worker's socket, new at every start of the worker."""


class Hub:
    """The controller's socket: receives from all workers, sends to each by its Peer.

    No array of a worker's message is longer than `context_tokens`. Connections that do not
    authenticate are closed after HANDSHAKE_MS, and workers reconnect by themselves, so such
    connections delay a worker only while there are more of them than the process may have open.
    """

    def __init__(
        self, run_dir: Path, host: str = "127.0.0.1", context_tokens: int = wire.MAX_LENGTH
    ) -> None:
        if host not in LOOPBACK and not has_curve():
            raise ConfigError(
                f"run.host = {host}: the controller listens on other hosts only with CURVE, which "
                "this build of libzmq lacks; install pyzmq's own wheel, or run on one host"
            )
        before = run_dir / "controller.address"
        port = int(before.read_text().rsplit(":", 1)[1]) if before.exists() else 0
        keys = run_dir / "keys" if port else _make_keys(run_dir)
        addresses.raise_descriptor_limit()
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(keys / "allowed"))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_publickey, self._socket.curve_secretkey = zmq.auth.load_certificate(
            keys / "hub.key_secret"
        )
        self._socket.curve_server = True
        _configure(self._socket)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._socket.setsockopt(zmq.BACKLOG, BACKLOG)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # leases and batches bound the queue
        self._plain: Any = zmq.Socket.shadow(self._socket)  # the same socket, read without waiting
        self._in_a_row = 0
        # a sample, the message with the most arrays, has three
        self._codec = Codec(max_length=context_tokens, max_decoded_bytes=3 * 4 * context_tokens)
        self.num_malformed = 0
        if port:
            self._bind_again(f"tcp://{host}:{port}")
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
            files.write_atomic(before, f"tcp://{host}:{port}\n".encode())

    async def receive(self) -> tuple[Peer, AnyMessage | UnknownHello | Malformed]:
        """Returns the next message; Malformed or UnknownHello if it cannot be decoded."""
        peer, *frames = await self._receive()
        buffers = [frame.buffer for frame in frames]
        try:
            return Peer(peer.bytes), self._codec.decode(buffers)
        except ProtocolError as e:
            self.num_malformed += 1
            unknown = read_unknown_hello(buffers[0]) if buffers else None
            return Peer(peer.bytes), unknown or Malformed(str(e))

    async def _receive(self) -> list[zmq.Frame]:
        """Receives a waiting message without asyncio, which would cost more than the message."""
        self._in_a_row += 1
        if self._in_a_row > MAX_IN_A_ROW:
            self._in_a_row = 0
            await asyncio.sleep(0)
        try:
            frames = [self._plain.recv(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            self._in_a_row = 0
            return await self._socket.recv_multipart(copy=False)
        while frames[-1].more:  # the rest of a message is there with its first frame
            frames.append(self._plain.recv(copy=False))
        return frames

    async def send(self, peer: Peer, message: Message) -> bool:
        """Returns False if the worker is not connected; missing heartbeats will show the loss."""
        try:
            await self._socket.send_multipart([peer, *self._codec.encode(message)], copy=False)
        except zmq.ZMQError as e:
            if e.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def _bind_again(self, address: str) -> None:
        """Binds the address of the previous controller, which its workers know."""
        deadline = time.monotonic() + REBIND_S
        while True:
            try:
                self._socket.bind(address)
                return
            except zmq.ZMQError as e:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{address}, this run's address, is taken: {e.strerror}; stop the process "
                        "that listens there, or remove controller.address from run.dir and restart "
                        "all workers"
                    ) from None
                time.sleep(0.1)

    def close(self) -> None:
        self._authenticator.stop()
        self._socket.close()
        self._context.term()


class _Rejoining:
    """Decides which RejoinRequests are answered by a Hello.

    Heartbeats wait in the socket while the controller restarts, and each gets a RejoinRequest. A
    second Hello would void the leases and the offer that followed the first one.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # when the unanswered Hello was sent

    def needs_hello(self) -> bool:
        now = time.monotonic()
        if self._since is not None and now - self._since < REJOIN_S:
            return False
        self._since = now
        return True

    def welcomed(self) -> None:
        self._since = None


class Link:
    """A worker's socket under asyncio."""

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        addresses.raise_descriptor_limit()  # a rollout worker has connections for each sample
        self._context = zmq.asyncio.Context()
        self._socket = _connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._rejoining = _Rejoining()

    async def join(self, hello: Hello | Callable[[], Hello], timeout_s: float = JOIN_S) -> int:
        """Sends Hello and returns the controller's epoch.

        Raises ProtocolError if refused or not answered.
        A callable is called for every RejoinRequest too: all earlier leases are void then.
        """
        self._hello = lambda: with_versions(hello() if callable(hello) else hello)
        await self.send(self._hello())
        try:
            return _epoch(await asyncio.wait_for(self._receive(), timeout_s))
        except TimeoutError:
            raise ProtocolError(f"the controller did not answer within {timeout_s:.0f} s") from None

    async def receive(self) -> AnyMessage:
        """Returns the next message; answers RejoinRequest by itself."""
        while True:
            message = await self._receive()
            if isinstance(message, messages.RejoinRequest):
                if self._rejoining.needs_hello():
                    await self.send(self._hello())
            elif isinstance(message, Refused):
                raise _refused(message)
            elif isinstance(message, messages.Welcome):
                self._rejoining.welcomed()
            else:
                return message

    async def _receive(self) -> AnyMessage:
        return self._codec.decode(await self._socket.recv_multipart())

    async def send(self, message: Message) -> None:
        await self.send_encoded(self._codec.encode(message))

    async def send_encoded(self, frames: list[wire.Frame]) -> None:
        await self._socket.send_multipart(frames, copy=False)

    async def serve(self, *loops: Coroutine[Any, Any, object]) -> None:
        """Runs the loops of a worker until the first one ends, and cancels the others.

        Reports an Error of theirs to the controller, and raises it.
        """
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Error as e:
            await self.send(messages.Failed(str(e)))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class SyncLink:
    """A worker's socket for code that blocks: the trainer.

    Repeats its unanswered reports and requests to a restarted controller, and after RESEND_S; both
    ends accept duplicates.
    """

    ended: messages.Shutdown | None = None  # set when it was received, by any call

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        self._context = zmq.Context()
        self._socket = _connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._controller = (run_dir / "controller.address").read_text().strip()
        self._hello: Hello | None = None
        self._rejoining = _Rejoining()
        self._unanswered: list[Message] = []
        self._early: messages.TrainBatch | None = None  # came before the answer to an offer
        self._silent_since = time.monotonic()  # last message of the controller, or report to it

    @property
    def own_address(self) -> str:
        """This host's address on the route to the controller; loopback if that is on this host."""
        return addresses.own_address(self._controller)

    def join(self, hello: Hello, timeout_s: float = JOIN_S) -> int:
        hello = with_versions(hello)
        self.send(hello)
        try:
            epoch = _epoch(self._receive(timeout_s))
        except TimeoutError as e:
            raise ProtocolError(str(e)) from None
        self._hello = hello
        return epoch

    def receive(self, timeout_s: float) -> AnyMessage:
        """Returns the next message; answers RejoinRequest by itself. Raises TimeoutError.

        Returns a batch after the answer to an outstanding offer: a restarted controller gets the
        repeated request first and may send the batch at once, during the weight update.
        """
        deadline = time.monotonic() + timeout_s
        message: AnyMessage
        while True:
            is_offering = any(isinstance(m, weight_messages.PublishOffer) for m in self._unanswered)
            if self._early and not is_offering:
                message, self._early = self._early, None
                break
            try:
                message = self._receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self._send(messages.Heartbeat())  # makes a restarted controller send RejoinRequest
                if time.monotonic() - self._silent_since > RESEND_S:
                    self._silent_since = time.monotonic()
                    for again in self._unanswered:
                        self._send(again)
                raise
            self._silent_since = time.monotonic()
            if isinstance(message, messages.RejoinRequest) and self._hello is not None:
                if self._rejoining.needs_hello():
                    for again in (self._hello, *self._unanswered):
                        self._send(again)
            elif isinstance(message, Refused):
                raise _refused(message)
            elif isinstance(message, messages.Welcome):
                self._rejoining.welcomed()
            elif isinstance(message, messages.TrainBatch) and is_offering:
                self._early = message
            else:
                break
        self._unanswered = [m for m in self._unanswered if not _answers(message, m)]
        if isinstance(message, messages.Shutdown):
            self.ended = message
        return message

    def wait_readable(self, end: int) -> bool:
        """Waits for a message, which stays unread; False if the descriptor `end` is readable first.

        For a thread that waits while no other thread uses this link.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(end, zmq.POLLIN)
        return end not in dict(poller.poll())

    def send(self, message: Message) -> None:
        if isinstance(message, _REPEATED):
            self._unanswered.append(message)
            self._silent_since = time.monotonic()
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


def _answers(message: AnyMessage, sent: Any) -> bool:
    """Returns whether this message answers `sent`, a message of one of the types in _REPEATED.

    A requested batch is still awaited after a weight update (Republish). A batch of an earlier
    version is a duplicate.
    """
    match message:
        case messages.Shutdown():
            return True
        case messages.TrainBatch():
            return bool(sent.version <= message.version)
        case weight_messages.Published():
            return sent.version <= message.version and not isinstance(sent, messages.GetBatch)
    return False


def _epoch(answer: AnyMessage) -> int:
    if isinstance(answer, Refused):
        raise _refused(answer)
    if not isinstance(answer, messages.Welcome):
        raise ProtocolError(f"expected Welcome from the controller, got {type(answer).__name__}")
    return answer.epoch


def _refused(answer: Refused) -> ProtocolError:
    return ProtocolError(f"the controller refused this worker: {answer.reason}")


def _connect(context: Any, run_dir: Path, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    address = run_dir / "controller.address"
    while not address.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no controller wrote {address} within {timeout_s:.0f} s; start one with this "
                "run.dir"
            )
        time.sleep(0.05)
    keys = run_dir / "keys"
    sock = context.socket(zmq.DEALER)
    sock.curve_publickey, sock.curve_secretkey = zmq.auth.load_certificate(
        keys / "worker.key_secret"
    )
    sock.curve_serverkey, _ = zmq.auth.load_certificate(keys / "hub.key")
    sock.setsockopt(zmq.IDENTITY, secrets.token_bytes(8))
    _configure(sock)
    sock.connect(address.read_text().strip())
    return sock


def _configure(sock: zmq.Socket) -> None:
    """Sets limits; makes the kernel notice a lost host within a minute, so both ends reconnect."""
    for option, value in (
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.LINGER, LINGER_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 30),
        (zmq.TCP_KEEPALIVE_INTVL, 10),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        sock.setsockopt(option, value)


def _make_keys(run_dir: Path) -> Path:
    """Makes the key pairs of hub and workers; only the workers' public key is allowed."""
    keys = run_dir / "keys"
    (keys / "allowed").mkdir(mode=0o700, parents=True, exist_ok=True)
    keys.chmod(0o700)
    previous_umask = os.umask(0o077)
    try:
        zmq.auth.create_certificates(keys, "hub")
        public, _ = zmq.auth.create_certificates(keys, "worker")
        files.write_atomic(keys / "allowed" / "worker.key", Path(public).read_bytes())
    finally:
        os.umask(previous_umask)
    return keys


def has_curve() -> bool:
    """Returns whether this build of libzmq can encrypt and authenticate."""
    return bool(zmq.has("curve"))
