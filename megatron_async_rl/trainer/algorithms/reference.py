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
from megatron_async_rl.weights.parameters import router_biases

_copies: WeakKeyDictionary[GPTModel, list[Tensor]] = WeakKeyDictionary()  # by first chunk


@contextmanager
def reference_weights(model: TrainerModel, config: Config) -> Iterator[None]:
    """Gives the model the weights of model.path inside the block; for forward passes only."""
    weights = _weights(model)
    first = model.modules[0]
    if first not in _copies:
        _copies[first] = _read(model, config)
    own = [w.data for w in weights]
    for w, reference in zip(weights, _copies[first], strict=True):
        w.data = reference
    try:
        yield
    finally:
        for w, data in zip(weights, own, strict=True):
            w.data = data


def _weights(model: TrainerModel) -> list[Tensor]:
    biases = (bias for module in model.modules for _, bias in router_biases(module))
    return [*model.parameters(), *biases]


@torch.no_grad()
def _read(model: TrainerModel, config: Config) -> list[Tensor]:
    """Reads model.path again: the model's weights may already be those of a checkpoint."""
    weights = _weights(model)
    own = [w.clone() for w in weights]
    if config.model.random_init:
        fill_random(model.modules, model.shape, config.run.seed)
    else:
        load_folder(model.modules, config.model.path, model.shape)
    reference = [w.clone() for w in weights]
    for w, data in zip(weights, own, strict=True):
        w.copy_(data)
    return reference
