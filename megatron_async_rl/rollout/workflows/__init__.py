"""Workflows that ship with the project, by the name that `rollout.workflow` uses."""

from __future__ import annotations

import importlib

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.rollout.workflow import Workflow
from megatron_async_rl.rollout.workflows.single_turn import SingleTurn

SHIPPED: dict[str, type[Workflow]] = {"single_turn": SingleTurn}


def load_workflow(name: str) -> Workflow:
    """Instantiates a shipped workflow, or package.module:Class. Raises ConfigError if it cannot."""
    if name in SHIPPED:
        return SHIPPED[name]()
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("not of the form package.module:Class")
        workflow: Workflow = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as e:
        raise ConfigError(
            f"rollout.workflow = {name!r} cannot be loaded: {e}; use one of {', '.join(SHIPPED)}, "
            "or package.module:Class on PYTHONPATH"
        ) from e
    return workflow
