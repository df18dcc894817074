"""Exports the policy as a Hugging Face folder that transformers and SGLang load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_async_rl.errors import DataError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import ModelShape, num_parameters
from megatron_async_rl.storage import exported, snapshots
from megatron_async_rl.weights.parameters import Modules
from megatron_async_rl.weights.reshard import own_tensors, source_number, takes_part

logger = logging.getLogger(__name__)

FILE_BYTES = 4 << 30
MARGIN_BYTES = 1 << 23  # tokenizer, index, digests


def export_hf(
    modules: Modules, shape: ModelShape, source_dir: str | Path, out_dir: str | Path
) -> None:
    """Writes the modules' weights; collective over all trainer ranks, on a shared file system.

    Each weight source (weights/reshard.py) writes its own files; configuration and tokenizer files
    are copied from source_dir; the dtype is that of its config.json. out_dir appears complete, by
    a rename, and replaces an older one; it has the digests of its files (storage/exported.py).
    Raises DataError on all ranks, before anything is written, if the disk has too little space.
    """
    source, out = Path(source_dir), Path(out_dir)
    partial = out.with_name(f".{out.name}.partial")
    dtype = _stored_dtype(source)  # before anything else: the folder may have been removed
    needed = num_parameters(shape) * (dtype or torch.float32).itemsize + MARGIN_BYTES
    problem = [_make_folder(partial, needed) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise DataError(
            f"{out} is not exported: {problem[0]}",
            "free disk space; the checkpoint of this version has the weights",
        )
    if takes_part():
        tensors = own_tensors(modules, shape, dtype)
        _write_part(tensors, partial, source_number())
    dist.barrier()
    if dist.get_rank() == 0:
        digests = _write_index(partial)
        snapshots.copy_settings(source, partial)
        exported.write_digests(partial, digests)
        _replace(partial, out)
        logger.info("exported the policy to %s", out)
    dist.barrier()


def _make_folder(partial: Path, needed: int) -> str:
    """Makes an empty folder; returns why so many bytes cannot be written there, or ""."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        return f"it needs {needed:,} bytes, the disk has {free:,}" if free < needed else ""
    except OSError as e:
        return str(e)


def _stored_dtype(source: Path) -> torch.dtype | None:
    name = HfConfig(source).dtype_name
    return getattr(torch, name) if name else None


def _write_part(tensors: Iterator[tuple[str, Tensor]], folder: Path, number: int) -> None:
    """Saves tensors in files of about FILE_BYTES, and a list of each file's tensors and digest."""
    held: dict[str, Tensor] = {}
    file_of: dict[str, str] = {}
    sizes: list[int] = []
    digests: dict[str, Future[str]] = {}
    pool = ThreadPoolExecutor(4)  # sha256 releases the interpreter lock

    def flush() -> None:
        name = f"model-{number + 1:05d}-{len(sizes) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(held, name))
        digests[name] = pool.submit(exported.synced_digest, folder / name)
        sizes.append(sum(t.nbytes for t in held.values()))
        held.clear()

    for name, tensor in tensors:
        # A copy: the tensor may be a view of a parameter.
        held[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
            flush()
    if held:
        flush()
    if file_of:
        found = {name: computed.result() for name, computed in digests.items()}
        (folder / f".part-{number}.json").write_text(
            json.dumps({"bytes": sum(sizes), "file_of": file_of, "digests": found})
        )
    pool.shutdown()


def _write_index(folder: Path) -> dict[str, str]:
    """Names the files of all parts; returns their digests by name."""
    lists = sorted(folder.glob(".part-*.json"))
    parts = [json.loads(path.read_text()) for path in lists]
    weight_map = {name: file for part in parts for name, file in part["file_of"].items()}
    digests = {name: digest for part in parts for name, digest in part["digests"].items()}
    if len(digests) == 1:
        [(name, digest)] = digests.items()
        (folder / name).rename(folder / "model.safetensors")
        digests = {"model.safetensors": digest}
    else:
        snapshots.write_index(folder, weight_map, sum(part["bytes"] for part in parts))
    for path in lists:
        path.unlink()
    return digests


def _replace(partial: Path, out: Path) -> None:
    """Renames the folder to `out`; moves an older one away first, as rename needs an empty
    target."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
