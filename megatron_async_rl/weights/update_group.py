"""The process group of one weight source and the servers' tensor-parallel ranks, and its store.

Rank 0 is the source. The group is independent of the trainer's own world: neither side knows the
other's ranks. Servers join through SGLang's /init_weights_update_group, which uses the same store
and prefix.

A receiver may fail during a broadcast. gloo reports it, or its timeout ends the wait. NCCL reports
nothing: its kernel waits on the GPU, and torch's watchdog would end this process. So NCCL's own
timeout is set very high, the deadline is checked here, and a late broadcast is aborted. `stop` ends
a broadcast earlier, from another thread: NCCL by an abort; gloo, which has none, by a shutdown of
its connections.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

# Environment variable: path of the trainer ranks' FileStore, if all of them run on one host.
STORE_VARIABLE = "MEGATRON_ASYNC_RL_RANK_STORE"
_BACKLOG = 1024
_NEVER = timedelta(days=7)
_POLL_S = 0.0005


def listening_store(address: str, port: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Returns a TCPStore that listens on `address`; torch's own listens on all of the host's.

    Port 0 selects a free one. Does not wait for the other ranks.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
        store = dist.TCPStore(
            address,
            listener.getsockname()[1],
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
        listener.detach()  # the store closes it
    return store


class UpdateGroup:
    """Listens on `address` when created; `join` blocks until all server ranks have joined.

    Every call returns within `timeout_s`.
    """

    def __init__(
        self, name: str, world_size: int, backend: str, address: str, timeout_s: float
    ) -> None:
        self.name = name
        self._world_size = world_size
        self._backend = backend
        self._timeout_s = timeout_s
        self.address = address  # of this host, as the servers' hosts reach it
        self._before = _open_sockets().keys()
        self._store: dist.TCPStore | None = listening_store(
            address, 0, world_size, timedelta(seconds=timeout_s)
        )
        self.port: int = self._store.port
        self._group: dist.ProcessGroup | None = None
        self._aborted = False
        self._stopped = ""  # why
        self._sockets: set[str] | None = None  # of the joined group, listening ones too
        self._work: list[dist.Work] = []

    def join(self) -> None:
        """Raises RuntimeError (torch's) if not all server ranks join in time.

        Those that wait for the others then fail too: the store closes their connections.
        """
        timeout = _NEVER if self._backend == "nccl" else timedelta(seconds=self._timeout_s)
        before = _open_sockets().keys()
        try:
            self._check_stopped()
            self._group, _ = c10d._new_process_group_helper(
                self._world_size,
                0,
                [],
                c10d.Backend(self._backend),
                c10d.PrefixStore(self.name, self._store),
                group_name=self.name,
                timeout=timeout,
            )
        except RuntimeError as e:
            self._store = None
            raise RuntimeError(self._stopped or str(e)) from None
        self._sockets = _open_sockets().keys() - before
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._world_size)}

    def broadcast(self, flat: Tensor) -> None:
        """Starts to send a tensor to all server ranks; do not change it before `wait` returned.

        Raises RuntimeError if a receiver is known to be lost.
        """
        self._check_stopped()
        work = dist.broadcast(flat, group=self._group, group_src=0, async_op=True)
        assert work is not None
        self._work.append(work)

    def wait(self, keep: int = 0) -> None:
        """Waits for all but the last `keep` broadcasts.

        gloo's have then completed, NCCL's are ordered before later work of the current stream.
        Raises RuntimeError if a receiver is lost or late (gloo).
        """
        while len(self._work) > keep:
            self._work.pop(0).wait()
        self._check_stopped()  # an aborted NCCL kernel ends like one that has sent all

    def finish(self) -> None:
        """Waits until everything is sent.

        Raises RuntimeError if a receiver is lost or late; the group is then unusable.
        """
        self.wait()
        if self._backend != "nccl":
            return
        sent = torch.cuda.Event()
        sent.record()
        deadline = time.monotonic() + self._timeout_s
        while not sent.query():
            if time.monotonic() > deadline:
                self.abort()
                raise RuntimeError(f"no receiver took the broadcast within {self._timeout_s:.0f} s")
            time.sleep(_POLL_S)
        self._check_stopped()

    def stop(self, reason: str) -> None:
        """Ends `join` and pending broadcasts: they raise RuntimeError. For another thread.

        The group is unusable; the thread that sends must abort it.
        """
        self._stopped = reason
        if (group := self._group) and self._backend == "nccl":
            group.abort()
            return
        joined = self._sockets  # before: those of the store too, over which `join` waits
        for name, descriptor in _open_sockets().items():
            if name in joined if joined is not None else name not in self._before:
                _shut_down(descriptor)

    def _check_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError(self._stopped)

    def abort(self) -> None:
        """Ends pending broadcasts on all ranks: the others see a closed connection."""
        self._work.clear()
        if self._group is None or self._aborted:
            return
        self._aborted = True
        if self._backend == "nccl":
            c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)
            self._group = None

    def close(self) -> None:
        self._work.clear()
        if self._group is not None and not self._aborted:
            dist.destroy_process_group(self._group)
        self._group = None


def _open_sockets() -> dict[str, int]:
    """Returns the descriptors of this process's sockets by their names, which are unique."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            name = str(link.readlink())
            if name.startswith("socket:"):
                found[name] = int(link.name)
    return found


def _shut_down(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            connection.shutdown(socket.SHUT_RDWR)
