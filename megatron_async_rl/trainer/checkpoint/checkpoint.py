"""Saves and loads model, optimizer and schedule with Megatron's distributed checkpointing.

A checkpoint can be loaded under another parallel layout. With checkpoint.asynchronous a child
process writes while the next steps train. `poll`, called after each step, notices that it is done,
digests the files and reports the folder to the controller, which writes the manifest
(storage/checkpoints.py). A folder without a manifest is ignored.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.model.shape import num_parameters
from megatron_async_rl.storage import checkpoints
from megatron_async_rl.trainer.model.build import TrainerModel

logger = logging.getLogger(__name__)
BYTES_PER_PARAMETER = 16  # at most: parameter, its fp32 copy, Adam's two moments
MARGIN_BYTES = 1 << 23


class Checkpointer:
    """Saves and loads the run's checkpoints. All methods are collective over all trainer ranks.

    `on_saved(version, folder)` is called on rank 0 when all files of a checkpoint are complete.
    """

    def __init__(
        self,
        model: TrainerModel,
        config: Config,
        run_dir: Path,
        on_saved: Callable[[int, str], None],
    ) -> None:
        # A writer that outlived this rank could write into a checkpoint of its next incarnation.
        processes.make_forks_die_with_parent()
        self._model = model
        self._every = config.checkpoint.every
        self._asynchronous = config.checkpoint.asynchronous
        self._run_dir = run_dir
        self._on_saved = on_saved
        self._queue = AsyncCallsQueue()
        self._version = -1  # last saved or being saved
        self._writing = False
        self._digests: Future[None] | None = None

    def load(self) -> int:
        """Loads the newest undamaged checkpoint and returns its version; 0 if there is none yet.

        Raises DataError if all checkpoints are damaged.
        """
        found = checkpoints.list_manifests(self._run_dir)
        for manifest in found:
            damage = checkpoints.find_damage(
                self._run_dir, manifest, dist.get_rank(), dist.get_world_size()
            )
            if damage:
                logger.error(
                    "checkpoint %s is damaged: %s; trying the one before", manifest.folder, damage
                )
            if not self._on_any_rank(bool(damage)):
                self._load(self._run_dir / checkpoints.FOLDER / manifest.folder)
                self._version = manifest.version
                if dist.get_rank() == 0:
                    logger.info("loaded checkpoint %s", manifest.folder)
                return manifest.version
        if found:
            raise DataError(
                f"all {len(found)} checkpoints in {self._run_dir / checkpoints.FOLDER} are "
                "damaged; restore one, or start over with --from-scratch"
            )
        self._version = 0  # the model that the run starts from needs no checkpoint
        return 0

    def step(self, version: int, last: bool = False) -> None:
        """Finishes a save that is done and starts one if it is due; call it after each step.

        `last`: a save is due now, and this waits until it is finished.
        """
        self.poll()
        due = self._every and (last or version % self._every == 0)
        if due and version != self._version:
            self.poll(wait=True)  # one save at a time
            self._start_save(version)
        if last:
            self.poll(wait=True)

    def save(self, version: int) -> None:
        """Saves now and waits until the checkpoint is reported; nothing if saving is disabled."""
        if self._every:
            self.step(version, last=True)

    def poll(self, wait: bool = False) -> None:
        """Advances the save in progress: written, then digested, then reported."""
        if self._writing:
            if self._asynchronous:
                self._queue.maybe_finalize_async_calls(blocking=wait)
                self._writing = self._queue.get_num_unfinalized_calls() > 0
            else:
                self._writing = False
            if not self._writing:
                self._digests = ThreadPoolExecutor(1, "digests").submit(self._digest)
        if self._digests and not self._writing:
            if wait:
                futures.wait([self._digests])
            if self._on_any_rank(not self._digests.done()):
                return
            error, self._digests = self._digests.exception(), None
            if error:
                logger.error("checkpoint of version %d: %s", self._version, error)
            if not self._on_any_rank(error is not None) and dist.get_rank() == 0:
                self._on_saved(self._version, checkpoints.folder_name(self._version))

    def close(self) -> None:
        """Stops Megatron's writer processes."""
        self._queue.close()

    def _start_save(self, version: int) -> None:
        folder = self._folder(version)
        problem = ""
        # Checked before the save: a rank that fails during it leaves the others waiting.
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(folder, ignore_errors=True)  # unfinished, of an earlier incarnation
                folder.mkdir(parents=True)
                parameters = sum(num_parameters(m.shape) for m in self._models().values())
                needed = BYTES_PER_PARAMETER * parameters + MARGIN_BYTES
                if (free := shutil.disk_usage(folder).free) < needed:
                    problem = f"needs {needed:,} bytes, the disk has {free:,}"
            except OSError as e:
                problem = str(e)
        if self._on_any_rank(bool(problem)):
            if problem:
                logger.error(
                    "checkpoint of version %d: %s; training continues without it", version, problem
                )
            return
        self._version = version
        metadata = {name: value for name, value in _metadata().items() if name != "dp_cp_group"}
        options: dict[str, Any] = {
            "content_metadata": metadata,
            "async_sharded_save": self._asynchronous,
        }
        parameters = inspect.signature(dist_checkpointing.save).parameters
        if self._asynchronous and "async_strategy" in parameters:
            options["async_strategy"] = "mcore"  # the default needs nvidia-resiliency-ext
        request = dist_checkpointing.save(self._state(loading=False), str(folder), **options)
        if self._asynchronous:
            self._queue.schedule_async_request(request)
        self._writing = True

    def _digest(self) -> None:
        """Writes the digests of this rank's shards and, on rank 0, of the files of no rank."""
        folder, rank = self._folder(self._version), dist.get_rank()
        names = [
            path.name
            for path in folder.iterdir()
            if path.is_file() and not path.name.startswith("digests.")
        ]
        mine = [name for name in names if name.startswith(f"__{rank}_")]
        if rank == 0:
            mine += [name for name in names if not name.startswith("__")]
        checkpoints.write_digests(folder, rank, mine)

    def _load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self._state(loading=True), str(folder))
        for prefix, model in self._models().items():
            for number, module in enumerate(model.modules):
                # no entry: a chunk without layers
                module.load_state_dict(state.get(f"{prefix}model{number}", {}))
            model.optimizer.load_state_dict(state[f"{prefix}optimizer"])
            model.scheduler.load_state_dict(state[f"{prefix}scheduler"])

    def _models(self) -> dict[str, TrainerModel]:
        """Returns policy and critic (if any) by the prefix of their names on disk."""
        critic = self._model.critic
        return {"": self._model} | ({"critic.": critic} if critic else {})

    def _state(self, loading: bool) -> dict[str, Any]:
        metadata = _metadata()
        state: dict[str, Any] = {}
        for prefix, model in self._models().items():
            if loading:
                _initialize_torch_adam(model.optimizer)
            # The keys number the chunks of an interleaved pipeline; on disk tensors have the names
            # of the whole model.
            chunks = {
                f"{prefix}model{number}": module.sharded_state_dict(metadata=metadata)
                for number, module in enumerate(model.modules)
            }
            if prefix:
                add_prefix_for_sharding(chunks, prefix)
            optimizer = model.optimizer.sharded_state_dict(
                chunks, is_loading=loading, metadata=metadata
            )
            state |= chunks
            state |= {
                f"{prefix}optimizer": optimizer,
                f"{prefix}scheduler": model.scheduler.state_dict(),
            }
        return state

    def _folder(self, version: int) -> Path:
        return self._run_dir / checkpoints.FOLDER / checkpoints.folder_name(version)

    def _on_any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank; collective."""
        tensor = torch.tensor([int(flag)], device=self._model.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor)


def _metadata() -> dict[str, Any]:
    """Returns options that store optimizer state in parameter shapes: any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def _initialize_torch_adam(optimizer: Any) -> None:
    """Creates the state of torch's AdamW before its first step, so that there is one to load into.

    Megatron's own initialization leaves out `step`, which torch's AdamW keeps per parameter.
    """
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = inner.optimizer
        if not isinstance(adam, torch.optim.AdamW | torch.optim.Adam):
            continue
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            state = adam.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
