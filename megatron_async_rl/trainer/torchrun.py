"""Runs torchrun with rendezvous stores that do not listen on every address of the host.

torchrun's own c10d rendezvous keeps its state as a pickle in a TCPStore that listens on all
addresses without a key: every client of that port can run code as this user. Two backends replace
it:

    file    one host: the stores are files that only this user may open; nothing listens
    bound   several hosts: a TCPStore listens on the given address only and holds JSON and text

Usage: python -m megatron_async_rl.trainer.torchrun OPTIONS, with torchrun's options; the backends
take --rdzv-backend=file --rdzv-endpoint=FOLDER or --rdzv-backend=bound
--rdzv-endpoint=ADDRESS:PORT.
"""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main

from megatron_async_rl.weights.update_group import STORE_VARIABLE, listening_store


class _Rendezvous(RendezvousHandler):
    """A rendezvous of known nodes, once: `store` is ready, and ranks find it at `master`."""

    def __init__(
        self, params: RendezvousParameters, store: dist.Store, master: RendezvousStoreInfo
    ) -> None:
        self._params = params
        self._store = dist.PrefixStore(params.run_id, store)
        self._master = master

    def get_backend(self) -> str:
        return self._params.backend

    @property
    def use_agent_store(self) -> bool:
        return self._params.backend == "bound"

    def next_rendezvous(self) -> RendezvousInfo:
        rank = int(self._params.config.get("rank", 0))
        return RendezvousInfo(self._store, rank, self._params.max_nodes, self._master)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._params.run_id

    def shutdown(self) -> bool:
        return True


def _file_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    folder = Path(params.endpoint)
    folder.mkdir(mode=0o700, exist_ok=True)
    # A new name each time: an old store holds the keys of earlier ranks.
    name = f"{os.getpid()}-{secrets.token_hex(4)}"
    own, ranks = folder / f"torchrun-{name}", folder / f"ranks-{name}"
    for path in (own, ranks):
        path.touch(mode=0o600)
    os.environ[STORE_VARIABLE] = str(ranks)
    return _Rendezvous(params, dist.FileStore(str(own), 1), RendezvousStoreInfo("127.0.0.1", 0))


def _bound_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    address, _, port = params.endpoint.rpartition(":")
    timeout = timedelta(seconds=int(params.config["timeout"]))
    if int(params.config["rank"]) == 0:
        store = listening_store(address, int(port), params.max_nodes, timeout)
    else:
        store = dist.TCPStore(address, int(port), params.max_nodes, False, timeout)
    return _Rendezvous(params, store, RendezvousStoreInfo(address, int(port)))


if __name__ == "__main__":
    rendezvous_handler_registry.register("file", _file_rendezvous)
    rendezvous_handler_registry.register("bound", _bound_rendezvous)
    main()
