"""A harmless canary of another host: writes a pickle into every torch store that it reaches.

torchrun's own c10d rendezvous unpickles the values of its store: there the canary runs.
"""

from __future__ import annotations

import base64
import socket
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

CONNECT_S, STORE_S = 5.0, 10.0


def network_addresses() -> list[str]:
    """Returns IPv4 addresses of this host at which a run on 127.0.0.1 has no business.

    127.0.0.2 tells a listener on all addresses also on a host without a network.
    """
    interfaces = psutil.net_if_addrs().values()
    found = {a.address for addresses in interfaces for a in addresses if a.family == socket.AF_INET}
    return sorted(found - {"127.0.0.1"} | {"127.0.0.2"})


def is_reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), CONNECT_S) as link:
            # where nothing listens, the kernel may connect a socket to itself
            return link.getsockname() != link.getpeername()
    except OSError:
        return False


def write(address: str, port: int, run_id: str, file: Path) -> bool:
    """Returns whether a store there took the canary as the state of a torchrun rendezvous.

    It makes the folder `file` where it is unpickled.
    """
    # what os.mkdir(file) is in the first version of the format
    value = base64.b64encode(f"cos\nmkdir\n(V{file}\ntR.".encode())
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_S))
        store.set(f"torch.rendezvous.{run_id}", value)
        return store.get(f"torch.rendezvous.{run_id}") == value
    except RuntimeError:
        return False
