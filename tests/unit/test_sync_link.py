"""What a trainer rank's connection waits for, with a socket of the test."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from megatron_async_rl.protocol import messages, sockets
from megatron_async_rl.protocol.sync_link import SyncLink
from megatron_async_rl.protocol.wire import Codec


class Socket:
    """Has all messages that will come."""

    def __init__(self, *received: messages.Message) -> None:
        self.frames = deque([bytes(f) for f in Codec().encode(message)] for message in received)
        self.waited_s = 0.0

    def poll(self, timeout_ms: int) -> bool:
        self.waited_s += 0.0 if self.frames else timeout_ms / 1000
        return bool(self.frames)

    def recv_multipart(self) -> list[bytes]:
        return self.frames.popleft()

    def send_multipart(self, frames: list[Any], copy: bool = True) -> None:
        """Sends nothing."""


def link_with(socket: Socket, run_dir: Path, patch: pytest.MonkeyPatch) -> SyncLink:
    (run_dir / sockets.ADDRESS_FILE).write_text("tcp://127.0.0.1:1\n")
    patch.setattr(sockets, "connect", lambda *_: socket)
    return SyncLink(run_dir)


def test_rank_waits_for_its_checkpoint_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = [messages.CheckpointCommitted(2), messages.CheckpointCommitted(4)]
    socket = Socket(*committed, messages.RejoinRequest())
    link = link_with(socket, tmp_path, monkeypatch)
    for version in (2, 4):
        link.send(messages.CheckpointSaved(version, f"v{version:06d}"))
    link.await_commit()
    assert len(socket.frames) == 1 and socket.waited_s == 0.0
