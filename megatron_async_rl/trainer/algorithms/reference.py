"""The reference policy of the KL term: the weights of model.path, swapped in for a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_async_rl.config.config import Config
from megatron_async_rl.trainer.model.build import TrainerModel
from megatron_async_rl.weights.load import fill_random, load_folder

_copies: WeakKeyDictionary[GPTModel, list[Tensor]] = WeakKeyDictionary()  # by first chunk


@contextmanager
def reference_weights(model: TrainerModel, config: Config) -> Iterator[None]:
    """Gives the model the weights of model.path inside the block; for forward passes only."""
    parameters = list(model.parameters())
    first = model.modules[0]
    if first not in _copies:
        _copies[first] = _read(model, config)
    own = [p.data for p in parameters]
    for p, reference in zip(parameters, _copies[first], strict=True):
        p.data = reference
    try:
        yield
    finally:
        for p, data in zip(parameters, own, strict=True):
            p.data = data


@torch.no_grad()
def _read(model: TrainerModel, config: Config) -> list[Tensor]:
    """Reads model.path again: the model's weights may already be those of a checkpoint."""
    own = [p.clone() for p in model.parameters()]
    if config.model.random_init:
        fill_random(model.modules, model.shape, config.run.seed)
    else:
        load_folder(model.modules, config.model.path, model.shape)
    reference = [p.clone() for p in model.parameters()]
    for p, data in zip(model.parameters(), own, strict=True):
        p.copy_(data)
    return reference
