"""The controller's orders to a weight source during an update (controller/weight_sync/ draws them).

A source waits in `carry_out_orders` until its update is over. An order may take long: to wait for
the servers that join a group, to broadcast, to write a snapshot. While it is carried out, the
controller only sends the source a message if the attempt is void: a server failed (AbandonUpdate),
the controller was restarted, or the run ends. `stopped_by_order` then ends the order early, so that
the trainer can save within faults.shutdown_grace_s.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol import messages, weight_messages
from megatron_async_rl.protocol.sync_link import SyncLink

logger = logging.getLogger(__name__)
POLL_S = 5.0  # a waiting source sends Command.WAIT this often, within the collective timeout


class Command(IntEnum):
    """From a stage's first source to the ranks that only gather."""

    WAIT = 0
    SEND = 1
    SEND_AND_DIGEST = 2
    DONE = 3


class Source(Protocol):
    """The work of a weight source."""

    def open_group(self, order: weight_messages.OpenGroup) -> None: ...

    def send_buckets(self, order: weight_messages.SendBuckets) -> weight_messages.BucketsSent: ...

    def write_snapshot(
        self, order: weight_messages.WriteSnapshot
    ) -> weight_messages.SnapshotWritten: ...

    def broadcast_command(self, command: Command) -> Command: ...


def carry_out_orders(version: int, link: SyncLink, source: Source, timeout_s: float) -> bool:
    """Carries out the controller's orders until the update to `version` is over.

    Returns False if the run is over. Raises PublishError if that takes longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            message = link.ended or link.receive(POLL_S)
        except TimeoutError:
            if time.monotonic() > deadline:
                raise PublishError(
                    f"the controller did not end the update to version {version} within "
                    f"{timeout_s:.0f} s"
                ) from None
            source.broadcast_command(Command.WAIT)
            continue
        match message:
            case weight_messages.OpenGroup():
                source.open_group(message)
            case weight_messages.SendBuckets() | weight_messages.WriteSnapshot() if (
                message.version != version
            ):
                logger.warning("an order to send version %d is ignored", message.version)
            case weight_messages.SendBuckets():
                command = Command.SEND_AND_DIGEST if message.verify else Command.SEND
                source.broadcast_command(command)
                link.send(source.send_buckets(message))
            case weight_messages.WriteSnapshot():
                source.broadcast_command(Command.SEND_AND_DIGEST)
                link.send(source.write_snapshot(message))
            case weight_messages.Published() if message.version < version:
                pass  # an earlier version was offered twice
            case weight_messages.Published() | messages.Shutdown():
                source.broadcast_command(Command.DONE)
                return isinstance(message, weight_messages.Published)


@contextmanager
def stopped_by_order(link: SyncLink, stop: Callable[[str], None]) -> Iterator[None]:
    """Calls `stop` from another thread when a message arrives during the block."""
    end = os.eventfd(0)

    def listen() -> None:
        if link.wait_for_order(end):
            stop("the controller ended this attempt")

    listener = threading.Thread(target=listen, name="update-stop", daemon=True)
    listener.start()
    try:
        yield
    finally:
        os.eventfd_write(end, 1)
        listener.join()
        os.close(end)
