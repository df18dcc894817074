"""All gloo process groups of a process share one device, with one thread and one listening socket.

torch gives each group a device of its own, with a thread that wakes up 100 times a second to look
for events. With 60 groups, about as many as Megatron creates in every rank, this takes 4 % of a
core.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

from patch_checks import require
from torch.distributed import distributed_c10d as c10d


def install() -> None:
    """Replaces the class by which torch.distributed creates gloo groups."""
    require(c10d, "ProcessGroupGloo")
    gloo = c10d.ProcessGroupGloo
    require(gloo, "_Options", "create_default_device", "create_device")
    require(gloo._Options, "_devices", "_timeout")

    @functools.cache
    def devices(_pid: int) -> list[Any]:
        """Returns those of GLOO_SOCKET_IFNAME, which torch would use, or the default one.

        A fork needs its own: it has no copy of the thread.
        """
        names = os.environ.get("GLOO_SOCKET_IFNAME", "")
        made = [gloo.create_device(interface=name) for name in names.split(",") if name]
        return made or [gloo.create_default_device()]

    class SharedDeviceGloo(gloo):  # type: ignore[misc, valid-type]
        def __init__(
            self, store: Any, rank: int, size: int, timeout: timedelta = c10d.default_pg_timeout
        ) -> None:
            options = gloo._Options()
            options._timeout, options._devices = timeout, devices(os.getpid())
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = SharedDeviceGloo
