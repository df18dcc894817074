"""The process group over which weights leave: rank 0 is here, the engine's tensor-parallel ranks are the others.

It is a group beside the trainer's own world: neither side knows the other's ranks. The engine's end joins by SGLang's
/init_weights_update_group, which meets at the same store under the same prefix.

A receiver may die in the middle. gloo notices, or its deadline ends the wait. NCCL notices nothing: its kernel waits in
the GPU, and torch's watchdog would end this process; so its own timeout is put out of reach, the deadline is kept here,
and what is late is aborted.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron_async_rl.weights.store import listening_store

_OUT_OF_REACH = timedelta(days=7)
_POLL_S = 0.0005


class UpdateGroup:
    """Listens at once; `join` blocks until all engine ranks are in. Every call ends within `timeout_s`."""

    def __init__(
        self, name: str, world_size: int, backend: str, address: str, timeout_s: float
    ) -> None:
        self.name = name
        self._world_size = world_size
        self._backend = backend
        self._timeout_s = timeout_s
        self.address = address  # of this host, as the engines' hosts reach it
        self._store: dist.TCPStore | None = listening_store(
            address, 0, world_size, timedelta(seconds=timeout_s)
        )
        self.port: int = self._store.port
        self._group: dist.ProcessGroup | None = None
        self._broken = False
        self._work: list[dist.Work] = []

    def join(self) -> None:
        """Raises RuntimeError (torch's) when not all engine ranks join in time; those that wait for them then see it too."""
        try:
            self._join()
        except RuntimeError:
            self._store = None  # closes their connections
            raise

    def _join(self) -> None:
        self._group, _ = c10d._new_process_group_helper(
            self._world_size,
            0,
            [],
            c10d.Backend(self._backend),
            c10d.PrefixStore(self.name, self._store),
            group_name=self.name,
            timeout=_OUT_OF_REACH
            if self._backend == "nccl"
            else timedelta(seconds=self._timeout_s),
        )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._world_size)}

    def broadcast(self, flat: Tensor) -> None:
        """Starts to send [bytes] uint8 to all engine ranks; it must stay as it is until `wait` has returned for it.

        Raises RuntimeError when one is already known to be gone.
        """
        work = dist.broadcast(flat, group=self._group, group_src=0, async_op=True)
        assert work is not None
        self._work.append(work)

    def wait(self, keep: int = 0) -> None:
        """All but the last `keep` broadcasts are over: with gloo when this returns, with NCCL in the current stream's order.

        Raises RuntimeError when a receiver is gone or late (gloo).
        """
        while len(self._work) > keep:
            self._work.pop(0).wait()

    def finish(self) -> None:
        """Everything has been sent. Raises RuntimeError when a receiver is gone or late; the group is then broken."""
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

    def abort(self) -> None:
        """Ends what hangs, here and at the other ranks, who see the connection closed. The group is of no use after it."""
        self._work.clear()
        if self._group is None or self._broken:
            return
        self._broken = True
        if self._backend == "nccl":
            c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)
            self._group = None

    def close(self) -> None:
        self._work.clear()
        if self._group is not None and not self._broken:
            dist.destroy_process_group(self._group)
        self._group = None
