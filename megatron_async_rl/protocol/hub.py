"""The controller's socket: a ROUTER that all workers connect to.

A restarted controller has the same address and keys, so workers reconnect by themselves. It knows
none of them: it answers each message that was sent before Hello with RejoinRequest, and a worker
then sends one Hello for all of these.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from megatron_async_rl import addresses
from megatron_async_rl.errors import ConfigError, ProtocolError
from megatron_async_rl.protocol import sockets, wire
from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.wire import (
    AnyMessage,
    Codec,
    Malformed,
    UnknownHello,
    read_unknown_hello,
)
from megatron_async_rl.storage import files

MAX_IN_A_ROW = 16  # messages received before other coroutines run
HANDSHAKE_MS = 4000  # a connection that has not authenticated by then is closed
BACKLOG = 1024  # connections that the kernel holds until they are accepted
REBIND_S = 30.0  # for an earlier controller's port to become free


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
        if host not in sockets.LOOPBACK and not sockets.has_curve():
            raise ConfigError(
                f"run.host = {host}: the controller listens on other hosts only with CURVE, which "
                "this build of libzmq lacks; install pyzmq's own wheel, or run on one host"
            )
        before = run_dir / sockets.ADDRESS_FILE
        port = int(before.read_text().rsplit(":", 1)[1]) if before.exists() else 0
        keys = run_dir / "keys" if port else sockets.make_keys(run_dir)
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
        sockets.configure(self._socket)
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
