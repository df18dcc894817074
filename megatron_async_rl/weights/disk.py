"""A weight source's part of a snapshot (storage/snapshots.py): one safetensors file per bucket.

Uses the same two buffers as a broadcast: a thread writes, reads back and digests bucket k while
bucket k+1 is gathered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_async_rl.protocol.types import FileEntry
from megatron_async_rl.protocol.weight_messages import Bucket
from megatron_async_rl.storage.files import digest, sync
from megatron_async_rl.weights.bucket import fill_buckets, split_bucket
from megatron_async_rl.weights.digest import EngineDigests


class SnapshotWriter:
    """Writes part number `part` of a snapshot into `folder`, and sets `files` or `error`."""

    def __init__(self, folder: Path, part: int) -> None:
        self._folder = folder
        self._part = part
        self.files: list[FileEntry] = []
        self.error = ""
        self.seconds = {"write": 0.0}

    def stop(self, reason: str) -> None:
        """Ends the writing early, from another thread; what is left is only digested."""
        self.error = self.error or reason

    def write(
        self,
        plan: list[Bucket],
        tensors: Iterable[tuple[str, Tensor]],
        device: torch.device,
        digests: EngineDigests | None,
    ) -> None:
        """Writes `tensors` in buckets as planned (see fill_buckets).

        Exhausts `tensors` even after an error, since other ranks gather with this one. `digests`
        receives every tensor, written or not.
        """
        pending: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1) as thread:
            for number, (bucket, flat) in enumerate(fill_buckets(plan, tensors, device), 1):
                self._wait(pending)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # the thread copies on another stream
                pending = thread.submit(self._write_bucket, number, bucket, flat, digests)
            self._wait(pending)
        for _ in tensors:
            pass

    def _wait(self, pending: Future[None] | None) -> None:
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, SafetensorError) as e:  # such as a full disk
            self.error = self.error or f"writing to {self._folder}: {e}"

    def _write_bucket(
        self, number: int, bucket: Bucket, flat: Tensor, digests: EngineDigests | None
    ) -> None:
        started = time.monotonic()
        tensors = dict(split_bucket(bucket, flat))
        if digests:
            for name, tensor in tensors.items():
                digests.add(name, tensor)
        if self.error:
            return
        path = self._folder / f"model-{self._part + 1:05d}-{number:05d}.safetensors"
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, path, metadata={"format": "pt"})
        sync(path)
        self.files.append(FileEntry(path.name, path.stat().st_size, digest(path), list(tensors)))
        self.seconds["write"] += time.monotonic() - started
