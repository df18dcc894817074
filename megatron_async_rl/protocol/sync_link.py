"""A worker's connection to the controller for code that blocks: trainer ranks and recorder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import zmq

from megatron_async_rl import addresses
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.protocol import messages, sockets, weight_messages
from megatron_async_rl.protocol.link import JOIN_S, Rejoining, epoch_of, refusal, with_versions
from megatron_async_rl.protocol.messages import Hello, Message, Refused
from megatron_async_rl.protocol.wire import AnyMessage, Codec

RESEND_S = 120.0  # without an answer; a connection that breaks loses what was under way
_REPEATED = (
    messages.GetBatch, weight_messages.PublishOffer, messages.StepDone, messages.CheckpointSaved
)  # fmt: skip


class SyncLink:
    """A worker's socket for code that blocks: the trainer.

    Repeats its unanswered reports and requests to a restarted controller, and after RESEND_S; both
    ends accept duplicates.
    """

    ended: messages.Shutdown | None = None  # set when it was received, by any call

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        self._context = zmq.Context()
        self._socket = sockets.connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._controller = (run_dir / sockets.ADDRESS_FILE).read_text().strip()
        self._hello: Hello | None = None
        self._rejoining = Rejoining()
        self._unanswered: list[Message] = []
        self._early: messages.TrainBatch | None = None  # came before the answer to an offer
        self._unread: AnyMessage | None = None  # that ended wait_for_order
        self._silent_since = time.monotonic()  # last message of the controller, or report to it

    @property
    def own_address(self) -> str:
        """This host's address on the route to the controller; loopback if that is on this host."""
        return addresses.own_address(self._controller)

    def join(self, hello: Hello, timeout_s: float = JOIN_S) -> int:
        hello = with_versions(hello)
        self.send(hello)
        try:
            epoch = epoch_of(self._receive(timeout_s))
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
                message = self._next(max(0.0, deadline - time.monotonic()))
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
                raise refusal(message)
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

    def wait_for_order(self, end: int) -> bool:
        """Waits for a message that is no batch; `receive` will return it.

        Returns False if the descriptor `end` is readable first. For a thread that waits while no
        other thread uses this link, which has an outstanding offer.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(end, zmq.POLLIN)
        while end not in dict(poller.poll()):
            message = self._receive(0.0)
            if not isinstance(message, messages.TrainBatch):
                self._unread = message
                return True
            self._early = message
        return False

    def send(self, message: Message) -> None:
        if isinstance(message, _REPEATED):
            self._unanswered.append(message)
            self._silent_since = time.monotonic()
        self._send(message)

    def _next(self, timeout_s: float) -> AnyMessage:
        message, self._unread = self._unread, None
        return message if message is not None else self._receive(timeout_s)

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
