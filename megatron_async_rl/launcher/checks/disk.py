"""Checks run.dir: that it is a folder of the run alone, can be written and has space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher.claims import lock_path
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.shape import num_parameters
from megatron_async_rl.storage import checkpoints, snapshots

GIB = 1 << 30
MARGIN_BYTES = 256 << 20  # journal, samples and logs
# Of a checkpoint, per parameter: the parameter, its fp32 copy and Adam's two moments.
CHECKPOINT_BYTES = {"fp32": 16, "bf16": 14, "fp16": 14}
# One of them is in every folder in which a run was started.
_TRACES = ("keys", "journal.sqlite", "journal.mark")
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_run_folder(config: Config) -> str:
    """Raises ConfigError for a folder that cannot be written, or holds other files than a run's.

    `run` renames the folder of an earlier run: it must not be that of a project or of all runs. The
    lock of a run is a file beside it: for a new one the folder above must be writable, too.
    """
    run_dir = config.run_dir.resolve()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    is_old = folder == run_dir
    needs_lock = is_old and not lock_path(run_dir).exists()
    for written in [folder, run_dir.parent] if needs_lock else [folder]:
        if not written.is_dir() or not os.access(written, os.W_OK | os.X_OK):
            problem = "cannot be written" if written.is_dir() else "is no folder"
            raise ConfigError(
                f"run.dir = {run_dir}: {written} {problem}",
                "set run.dir to a new folder in one that you can write",
            )
    names = sorted(path.name for path in run_dir.iterdir()) if is_old else []
    if names and not {*_TRACES} & {*names}:
        others = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"run.dir = {run_dir} holds {others}, and no run",
            f"set run.dir to a folder of its own, such as {config.run.dir.rstrip('/')}/first_run",
        )
    return f"{run_dir}: {'a run' if names else 'new'}"


def check_disk(config: Config) -> str:
    """Raises ConfigError if the file system of run.dir has too little free space.

    Files of an earlier start of the run count as free space, because they are replaced.
    """
    run_dir = config.run_dir.absolute()
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    parts = needed_bytes(config)
    kept = [run_dir / checkpoints.FOLDER, run_dir / snapshots.FOLDER, *run_dir.glob("policy*")]
    free = shutil.disk_usage(folder).free + sum(map(_size, kept))
    needed = MARGIN_BYTES + sum(parts.values())
    listed = ", ".join(f"{size_text(size)} {name}" for name, size in parts.items())
    found = f"run.dir = {run_dir}: {size_text(free)} free, {size_text(needed)} needed"
    found += f" ({listed})" if listed else ""
    if free < needed:
        raise ConfigError(
            found,
            "free disk space, set run.dir to another file system, or keep fewer copies "
            "(checkpoint.keep, run.export_every)",
        )
    return found


def needed_bytes(config: Config) -> dict[str, int]:
    """Returns the size of checkpoints, exports and snapshots at the end of the run, by name."""
    if not config.has_trainer:
        return {}
    run, shape = config.run, HfConfig(config.model.path).shape()
    parameters = num_parameters(shape)
    stored = _ELEMENT_BYTES.get(HfConfig(config.model.path).dtype_name or "float32", 4)
    exports = 1 + (run.steps // run.export_every if run.export_every else 0)
    parts = {f"for {exports} exported policies": exports * parameters * stored}
    if config.checkpoint.every:
        saves = -(-run.steps // config.checkpoint.every)
        count = min(
            saves, config.checkpoint.keep + 1
        )  # the oldest goes when the newest is complete
        models = 2 if config.algorithm.advantage.uses_critic else 1
        size = parameters * models * CHECKPOINT_BYTES[config.trainer.precision]
        parts[f"for {count} checkpoints (checkpoint.keep = {config.checkpoint.keep})"] = (
            count * size
        )
    if config.weights.transport == "disk" or config.weights.snapshot_every:
        element = 4 if config.trainer.precision == "fp32" else 2
        count = snapshots.KEEP + 1
        parts[f"for {count} snapshots"] = count * parameters * element
    return parts


def size_text(size_bytes: int) -> str:
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:,.1f} GiB"
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
