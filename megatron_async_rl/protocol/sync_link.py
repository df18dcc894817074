"""A worker's connection to the controller for code that blocks: trainer ranks and recorder."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import zmq

from megatron_async_rl import addresses
from megatron_async_rl.errors import ProtocolError
from megatron_async_rl.observability.status import FINAL_STATES, find_status
from megatron_async_rl.protocol import messages, sockets, weight_messages
from megatron_async_rl.protocol.link import (
    JOIN_S,
    SILENCE_S,
    Rejoining,
    epoch_of,
    refusal,
    with_versions,
)
from megatron_async_rl.protocol.messages import Hello, Message, Refused
from megatron_async_rl.protocol.wire import AnyMessage, Codec
from megatron_async_rl.storage import checkpoints

RESEND_S = 120.0  # without an answer; a connection that breaks loses what was under way
OVER_S = 15.0  # of silence, after which status.json tells whether the controller has ended
COMMIT_S = 30.0  # for the answer to the last CheckpointSaved
_REPEATED = (
    messages.GetBatch, weight_messages.PublishOffer, messages.StepDone, messages.CheckpointSaved
)  # fmt: skip


class SyncLink:
    """A worker's socket for code that blocks: the trainer.

    Repeats its unanswered reports and requests to a restarted controller, and after RESEND_S; both
    ends accept duplicates. A report of a checkpoint is repeated whenever the controller is silent.
    """

    ended: messages.Shutdown | None = None  # set when it was received, by any call

    def __init__(self, run_dir: Path, timeout_s: float = 60.0) -> None:
        self._run_dir = run_dir
        self._context = zmq.Context()
        self._socket = sockets.connect(self._context, run_dir, timeout_s)
        self._codec = Codec()
        self._controller = (run_dir / sockets.ADDRESS_FILE).read_text().strip()
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
        """Sends Hello and returns the controller's epoch; -1 if the run ends now.

        Raises ProtocolError if refused or not answered.
        """
        hello = self._hello = with_versions(hello)
        deadline = time.monotonic() + timeout_s
        self._rejoining.needs_hello()
        self._send(hello)
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                message = self._receive(min(left_s, SILENCE_S))
            except TimeoutError:
                self._send(hello if self._rejoining.is_overdue() else messages.Heartbeat())
                continue
            if (epoch := epoch_of(message)) is not None:
                self._rejoining.welcomed()
                return epoch
            if isinstance(message, messages.Shutdown):
                self.ended = message
                return -1
            if isinstance(message, messages.RejoinRequest) and self._rejoining.needs_hello():
                self._send(hello)
        raise ProtocolError(f"the controller did not answer within {timeout_s:.0f} s")

    def receive(self, timeout_s: float, until_commit: bool = False) -> AnyMessage:
        """Returns the next message; answers RejoinRequest by itself. Raises TimeoutError.

        Returns Shutdown too if the controller has ended and its Shutdown was lost. Returns
        CheckpointCommitted only with `until_commit`.

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
                if not self._has_ended():
                    self._send_again()
                    raise
                message = messages.Shutdown("the controller has ended")
                break
            self._silent_since = time.monotonic()
            if isinstance(message, messages.RejoinRequest):
                if self._rejoining.needs_hello():
                    for again in (self._hello, *self._unanswered):
                        self._send(again)
            elif isinstance(message, Refused):
                raise refusal(message)
            elif isinstance(message, messages.Welcome):
                self._rejoining.welcomed()
            elif isinstance(message, messages.TrainBatch) and is_offering:
                self._early = message
            elif isinstance(message, messages.CheckpointCommitted) and not until_commit:
                self._answered_by(message)
            else:
                break
        self._answered_by(message)
        if isinstance(message, messages.Shutdown):
            if self.ended is None:
                for report in self._unanswered:  # the controller waits for the checkpoint
                    self._send(report)
            self.ended = message
        return message

    def keep_joined(self) -> None:
        """Joins a restarted controller again; for a rank that expects no message now."""
        with contextlib.suppress(TimeoutError):
            self.receive(0.0)

    def await_commit(self) -> None:
        """Waits until the last checkpoint is committed, at most COMMIT_S."""
        deadline = time.monotonic() + COMMIT_S
        while (left_s := deadline - time.monotonic()) > 0 and not self._has_ended():
            if not any(isinstance(sent, messages.CheckpointSaved) for sent in self._unanswered):
                return
            with contextlib.suppress(TimeoutError):
                self.receive(min(left_s, SILENCE_S), until_commit=True)

    def wait_for_order(self, end: int) -> bool:
        """Waits for a message that is neither a batch nor a mere answer; `receive` will return it.

        Returns False if the descriptor `end` is readable first. For a thread that waits while no
        other thread uses this link, which has an outstanding offer.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(end, zmq.POLLIN)
        while end not in dict(poller.poll()):
            message = self._receive(0.0)
            if isinstance(message, messages.TrainBatch):
                self._early = message
            elif isinstance(message, messages.CheckpointCommitted):
                self._answered_by(message)
            else:
                self._unread = message
                return True
        return False

    def send(self, message: Message) -> None:
        if isinstance(message, _REPEATED):
            self._unanswered.append(message)
            self._silent_since = time.monotonic()
        self._send(message)

    def _has_ended(self) -> bool:
        """Returns whether a silent controller has ended, not only been killed."""
        if time.monotonic() - self._silent_since < OVER_S:
            return False
        status = find_status(self._run_dir)
        return status is not None and status.state in FINAL_STATES

    def _send_again(self) -> None:
        """Sends what the controller may not have got. A Heartbeat makes it send RejoinRequest."""
        self._send(messages.Heartbeat())
        is_overdue = time.monotonic() - self._silent_since > RESEND_S
        if is_overdue:
            self._silent_since = time.monotonic()
        for again in self._unanswered:
            if is_overdue or isinstance(again, messages.CheckpointSaved):
                self._send(again)

    def _answered_by(self, message: AnyMessage) -> None:
        self._unanswered = [sent for sent in self._unanswered if not _answers(message, sent)]

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
    version is a duplicate. Reports are due at the end too.
    """
    is_checkpoint = isinstance(sent, messages.CheckpointSaved)
    match message:
        case messages.CheckpointCommitted():
            return is_checkpoint and bool(sent.version <= message.version)
        case _ if is_checkpoint:
            return False
        case messages.Shutdown():
            return not isinstance(sent, messages.StepDone)
        case messages.TrainBatch():
            return bool(sent.version <= message.version)
        case weight_messages.Published():
            return sent.version <= message.version and not isinstance(sent, messages.GetBatch)
    return False


def is_finished(run_dir: Path, steps: int) -> bool:
    """Returns whether a run of so many steps is complete and its last checkpoint saved.

    Its controller has ended then.
    """
    status, saved = find_status(run_dir), checkpoints.list_manifests(run_dir)
    is_over = status is not None and status.state == "finished"
    return is_over and bool(saved) and saved[0].version >= steps
