"""Rendezvous stores for torch.distributed that listen on one address only."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

# Environment variable: path of the trainer ranks' FileStore, if all of them run on one host.
STORE_VARIABLE = "MEGATRON_ASYNC_RL_RANK_STORE"
_BACKLOG = 1024


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
