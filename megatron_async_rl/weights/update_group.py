"""The process group over which weights leave: rank 0 is here, the engine's tensor-parallel ranks are the others.

It is a group beside the trainer's own world: neither side knows the other's ranks. The engine's end joins by SGLang's
/init_weights_update_group, which meets at the same store under the same prefix.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d


class UpdateGroup:
    """Listens at once; `join` blocks until all engine ranks are in. Every call ends within `timeout_s`."""

    def __init__(self, name: str, world_size: int, backend: str, address: str, timeout_s: float) -> None:
        self.name = name
        self._world_size = world_size
        self._backend = backend
        self._timeout = timedelta(seconds=timeout_s)
        self.address = address  # of this host, as the engines' hosts reach it
        self._store = dist.TCPStore(
            address,
            0,  # the store picks a free port and holds it
            world_size,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
        )
        self.port: int = self._store.port
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        """Raises RuntimeError (torch's) when not all engine ranks join in time."""
        self._group, _ = c10d._new_process_group_helper(
            self._world_size,
            0,
            [],
            c10d.Backend(self._backend),
            c10d.PrefixStore(self.name, self._store),
            group_name=self.name,
            timeout=self._timeout,
        )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._world_size)}

    def broadcast(self, flat: Tensor) -> None:
        """Sends [bytes] uint8 to all engine ranks. Raises RuntimeError when one is gone or late."""
        dist.broadcast(flat, group=self._group, group_src=0)

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
