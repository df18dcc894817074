"""Repairs checkpoints of megatron-core 0.16.1 to 0.19.2: exact resume, no orphan process.

`install()` replaces names of megatron.core; a second call does nothing. README.md lists the
patches.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.managers
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from patch_checks import core_module, require

_installed = False


def install() -> None:
    """Applies the patches; raises DriftError where megatron.core has changed."""
    global _installed
    if not _installed:
        _results_queue()
        _torch_adam()
        _installed = True


class _PickledQueue:
    """A manager's queue of items that only its users unpickle.

    The manager would import torch to rebuild an item: 2 CPU seconds for each rank.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(bytes(ForkingPickler.dumps(item)))

    def get_nowait(self) -> Any:
        return ForkingPickler.loads(self._queue.get_nowait())


def _results_queue() -> None:
    """Makes the manager process of the asynchronous writers' queue small, and end with its rank.

    Megatron's own manager ignores SIGINT, asks for no parent-death signal, and outlives a killed
    rank.
    """
    from megatron_async_rl import processes

    module = core_module("dist_checkpointing.strategies.filesystem_async")
    name = "get_write_results_queue"
    if hasattr(module, f"_{name}"):  # 0.16.1
        name = f"_{name}"
    require(module, "_results_queue", name)

    def get_write_results_queue(*unused: Any, **also_unused: Any) -> Any:
        if module._results_queue is None:
            manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(processes.die_with_parent)
            module._results_queue = _PickledQueue(manager.Queue())
        return module._results_queue

    setattr(module, name, get_write_results_queue)


def _torch_adam() -> None:
    """Repairs the resume of the distributed optimizer with torch's AdamW.

    That is the optimizer without Apex and Transformer Engine. Two defects: Megatron reads `step`
    per parameter although it stores it per parameter group (KeyError); and after loading, all
    parameters share one step tensor, which then advances once per parameter (silently wrong
    updates).
    """
    module = core_module("optimizer.distrib_optimizer")
    require(module, "HAVE_APEX_OR_TE", "DistributedOptimizer")
    cls = module.DistributedOptimizer
    require(cls, "_set_main_param_and_optimizer_states", "load_state_dict")
    if module.HAVE_APEX_OR_TE:
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
