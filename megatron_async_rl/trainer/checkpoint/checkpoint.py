"""Model, optimizer and learning rate schedule to disk and back, by Megatron's distributed checkpointing.

A checkpoint can be loaded under another layout. Saving is asynchronous: a child process writes while the next steps train;
`poll` after each step finds out that it is done, digests the files, and tells the controller, which makes the folder a
checkpoint by its manifest (checkpoints.py). What is never told never counts.

All methods are collective over all trainer ranks.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import multiprocessing.managers
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import distrib_optimizer

from megatron_async_rl import processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError
from megatron_async_rl.storage import checkpoints
from megatron_async_rl.trainer.model.build import TrainerModel

logger = logging.getLogger(__name__)
BYTES_PER_PARAMETER = 16
MARGIN_BYTES = 1 << 23


class Checkpointer:
    """`saved(version, folder)` is called on rank 0 for every checkpoint whose files are whole."""

    def __init__(
        self, model: TrainerModel, config: Config, run_dir: Path, saved: Callable[[int, str], None]
    ) -> None:
        _repair_torch_adam()
        processes.forks_die_with_us()  # writers too: one that outlived us would write into what our next life saves
        self._model = model
        self._every = config.checkpoint.every
        self._asynchronous = config.checkpoint.asynchronous
        self._run_dir = run_dir
        self._saved = saved
        self._queue = AsyncCallsQueue()
        self._version = -1  # last saved or being saved
        self._writing = False
        self._digesting: threading.Thread | None = None
        self._error: BaseException | None = None

    def load(self) -> int:
        """Loads the newest checkpoint that is whole; its version, 0 where there is none yet.

        Raises DataError when there are checkpoints and all are damaged.
        """
        found = checkpoints.manifests(self._run_dir)
        for manifest in found:
            damage = checkpoints.damage(
                self._run_dir, manifest, dist.get_rank(), dist.get_world_size()
            )
            if damage:
                logger.error(
                    "checkpoint %s is damaged: %s; trying the one before", manifest.folder, damage
                )
            if not self._any(bool(damage)):
                self._load(self._run_dir / checkpoints.FOLDER / manifest.folder)
                self._version = manifest.version
                if dist.get_rank() == 0:
                    logger.info("loaded checkpoint %s", manifest.folder)
                return manifest.version
        if found:
            raise DataError(
                f"all {len(found)} checkpoints in {self._run_dir / checkpoints.FOLDER} are damaged; put one back, or begin "
                "anew with --from-scratch"
            )
        return 0

    def step(self, version: int, last: bool = False) -> None:
        """After each step: ends a save that is done, begins one where it is due. `last`: waits for it."""
        self.poll()
        due = self._every and (last or version % self._every == 0)
        if due and version != self._version:
            self.poll(wait=True)  # one at a time
            self._begin(version)
        if last:
            self.poll(wait=True)

    def save(self, version: int) -> None:
        """Saves now, and waits for it."""
        if self._every:
            self.step(version, last=True)

    def poll(self, wait: bool = False) -> None:
        """Moves a save that is under way on: written, digested, told."""
        if self._writing:
            if self._asynchronous:
                self._queue.maybe_finalize_async_calls(blocking=wait)
                self._writing = self._queue.get_num_unfinalized_calls() > 0
            else:
                self._writing = False
            if not self._writing:
                self._digesting = threading.Thread(target=self._digest, name="digests")
                self._digesting.start()
        if self._digesting and not self._writing:
            if wait:
                self._digesting.join()
            if self._any(self._digesting.is_alive()):
                return
            self._digesting = None
            if self._error:
                logger.error("checkpoint of version %d: %s", self._version, self._error)
            if not self._any(self._error is not None) and dist.get_rank() == 0:
                self._saved(self._version, checkpoints.folder_name(self._version))
            self._error = None

    def close(self) -> None:
        self._queue.close()

    # ---- inside

    def _begin(self, version: int) -> None:
        folder = self._folder(version)
        needed, refused = self._bytes(), ""
        if (
            dist.get_rank() == 0
        ):  # asked before, because ranks that fail in the middle of a save leave the others waiting
            try:
                shutil.rmtree(folder, ignore_errors=True)  # of a life that did not finish it
                folder.mkdir(parents=True)
                if (free := shutil.disk_usage(folder).free) < needed:
                    refused = f"it needs {needed:,} bytes and the disk has {free:,}"
            except OSError as e:
                refused = str(e)
        if self._any(bool(refused)):
            if refused:
                logger.error(
                    "checkpoint of version %d: %s; training goes on without it", version, refused
                )
            return
        self._version = version
        metadata = {name: value for name, value in _metadata().items() if name != "dp_cp_group"}
        options: dict[str, Any] = {
            "content_metadata": metadata,
            "async_sharded_save": self._asynchronous,
        }
        if (
            self._asynchronous
            and "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        ):
            options["async_strategy"] = (
                "mcore"  # newer versions' default needs nvidia-resiliency-ext
            )
        if self._asynchronous:
            _start_results_queue()
        request = dist_checkpointing.save(self._state(loading=False), str(folder), **options)
        if self._asynchronous:
            self._queue.schedule_async_request(request)
        self._writing = True

    def _bytes(self) -> int:
        """What a checkpoint takes at most: parameters, their fp32 copies and Adam's two moments."""
        own = sum(
            parameter.numel()
            for model in self._models().values()
            for parameter in model.parameters()
        )
        total = torch.tensor([own], dtype=torch.int64, device=self._model.device)
        dist.all_reduce(total)
        return BYTES_PER_PARAMETER * int(total) // mpu.get_data_parallel_world_size() + MARGIN_BYTES

    def _digest(self) -> None:
        """Digests of what this rank wrote: its own shards, and on rank 0 whatever bears no rank's number."""
        folder, rank = self._folder(self._version), dist.get_rank()
        try:
            names = [
                path.name
                for path in folder.iterdir()
                if path.is_file() and not path.name.startswith("digests.")
            ]
            mine = [name for name in names if name.startswith(f"__{rank}_")]
            if rank == 0:
                mine += [name for name in names if not name.startswith("__")]
            checkpoints.write_digests(folder, rank, mine)
        except OSError as e:
            self._error = e

    def _load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self._state(loading=True), str(folder))
        for prefix, model in self._models().items():
            for number, module in enumerate(model.modules):
                module.load_state_dict(state[f"{prefix}model{number}"])
            model.optimizer.load_state_dict(state[f"{prefix}optimizer"])
            model.scheduler.load_state_dict(state[f"{prefix}scheduler"])

    def _models(self) -> dict[str, TrainerModel]:
        """The policy, and the critic where there is one, by the prefix of their names on disk."""
        critic = self._model.critic
        return {"": self._model} | ({"critic.": critic} if critic else {})

    def _state(self, loading: bool) -> dict[str, Any]:
        metadata, state = _metadata(), {}
        for prefix, model in self._models().items():
            if loading:
                _begin_torch_adam(model.optimizer)
            # The keys here say which chunk of an interleaved pipeline it is; on disk tensors bear the whole model's names.
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

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        tensor = torch.tensor([int(flag)], device=self._model.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor)


def _metadata() -> dict[str, Any]:
    """How the optimizer's state is laid out on disk: in the parameters' own shapes, so any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def _start_results_queue() -> None:
    """The queue through which Megatron's writers answer, in a manager process that ends with this rank: Megatron would
    start one that waits for ever to be told."""
    if filesystem_async._results_queue is None:
        manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(processes.die_with_parent)
        filesystem_async._results_queue = manager.Queue()


# ---- the distributed optimizer with torch's AdamW (no Apex, no Transformer Engine), in megatron-core 0.16.1 to 0.19.2


def _begin_torch_adam(optimizer: Any) -> None:
    """Gives AdamW its state before the first step: there is nothing to load into without."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = inner.optimizer
        if not isinstance(adam, torch.optim.AdamW | torch.optim.Adam):
            continue
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            state = adam.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )


def _repair_torch_adam() -> None:
    """Two defects of its resume: `step` is asked for per parameter though it travels per group (KeyError); and once
    loaded, all parameters share one step tensor, which then counts once per parameter (silently wrong)."""
    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or getattr(cls, "_resumes_torch_adam", False):
        return
    set_states, load_state_dict = cls._set_main_param_and_optimizer_states, cls.load_state_dict

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            if "step" in state:
                tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in self.optimizer.state.get(parameter, {}):
                    self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    cls._set_main_param_and_optimizer_states = set_states_with_step
    cls.load_state_dict = load_with_own_steps
    cls._resumes_torch_adam = True
