"""The policy objectives (`algorithm.loss.objective`): the built-in ones, and how one is called.

An objective returns a loss per token; loss.py masks it, weights it and adds the other terms, and
has the formulas. Built-in objectives and a user's have the same interface and pass the same checks.

Suffix T: tokens of the micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from megatron_async_rl import hooks
from megatron_async_rl.config.algorithm import AlgorithmConfig, LossConfig
from megatron_async_rl.errors import ConfigError, HookFailed
from megatron_async_rl.trainer.data.sample_index import SampleIndex

SETTING = "algorithm.loss.objective"
KNOWN_METRICS = ("importance_weight", "clipped", "dual_clipped")
"""Metrics of an objective that have their own tags; others become train/user/NAME."""
_METRIC = re.compile(r"[a-z0-9_]{1,64}")


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """Tensors [T], 0 where the mask is False."""

    logprobs_T: Tensor  # current policy; the gradient flows through it
    old_T: Tensor  # the policy to compare with: proximal, or behavior if not `decoupled`
    behavior_T: Tensor  # the policy that sampled the token
    advantages_T: Tensor
    mask_T: Tensor  # bool: tokens that count
    staleness_T: Tensor  # int: versions from the one that sampled the token to this step's
    sample_index: SampleIndex  # the sample of each token, for sums and means over a sample


Metrics = dict[str, Tensor]
Objective = Callable[[ObjectiveInputs, LossConfig], Tensor | tuple[Tensor, Metrics]]


@dataclass(frozen=True, slots=True)
class LoadedObjective:
    """The configured objective. An attribute of the function that is not set has its default."""

    name: str
    function: Objective
    decoupled: bool
    """True (default): old_T is proximal, and loss.py weights by proximal / behavior. False: old_T
    is behavior, without weights and without a proximal pass."""
    surrogate: bool
    """True: the gradient is not that of the value, because a factor is detached on purpose. Only
    the selftest uses it. Default False."""
    metrics: tuple[str, ...] | None = None
    """Names of the metrics besides KNOWN_METRICS; None until the first call."""

    def __call__(self, inputs: ObjectiveInputs, config: LossConfig) -> tuple[Tensor, Metrics]:
        """Returns the loss per token [T] and metrics [T].

        Raises HookFailed for a wrong result, or if the function changed its inputs.
        """
        versions = _versions(inputs)
        returned = self.function(inputs, config)
        if changed := [name for name, v in _versions(inputs).items() if v != versions[name]]:
            raise HookFailed(
                f"{SETTING} = {self.name} changed inputs.{changed[0]} in place",
                "make a new tensor: the trainer uses the inputs after the call too",
            )
        match returned:
            case Tensor() as loss_T:
                metrics: Metrics = {}
            case (Tensor() as loss_T, dict() as metrics):
                pass
            case other:
                raise self._wrong(f"{type(other).__name__}, not a tensor, or a tensor and a dict")
        shape = tuple(inputs.mask_T.shape)
        for name, value in {"the loss": loss_T, **metrics}.items():
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                what = name if value is loss_T else f"the metric {name!r}"
                is_tensor = isinstance(value, Tensor)
                got = f"shape {tuple(value.shape)}" if is_tensor else f"type {type(value).__name__}"
                raise self._wrong(f"{what} of {got}, not of shape {shape}: one entry per token")
        if not loss_T.is_floating_point():
            raise self._wrong(f"a loss of type {loss_T.dtype}")
        for name in {"clipped", "dual_clipped"} & metrics.keys():
            if metrics[name].dtype != torch.bool:
                raise self._wrong(f"{name} of type {metrics[name].dtype}, not torch.bool")
        own = tuple(sorted(metrics.keys() - {*KNOWN_METRICS}))
        if self.metrics not in (None, own):
            raise self._wrong(f"the metrics {own}, in its first call {self.metrics}")
        return loss_T, metrics

    def _wrong(self, returned: str) -> HookFailed:
        return HookFailed(f"{SETTING} = {self.name} returned {returned}")


_loaded: dict[bytes, LoadedObjective] = {}


def load(algorithm: AlgorithmConfig) -> LoadedObjective:
    """Returns the configured objective, after one call of it on two small samples.

    Raises ConfigError if it cannot be loaded, HookFailed if the call fails.
    """
    key = msgspec.json.encode(algorithm)
    if key not in _loaded:
        _loaded[key] = _load(algorithm)
    return _loaded[key]


def _load(algorithm: AlgorithmConfig) -> LoadedObjective:
    name = algorithm.loss.objective
    function = hooks.guarded(SETTING, name)
    decoupled = getattr(function, "decoupled", True)
    threshold = algorithm.staleness_correction.m2_threshold
    if threshold is not None and not decoupled:
        raise ConfigError(
            f"algorithm.staleness_correction.m2_threshold = {threshold:g} needs proximal logprobs, "
            f"but {SETTING} = {name} has `decoupled = False`",
            "remove one of them",
        )
    surrogate = getattr(function, "surrogate", False)
    loaded = LoadedObjective(name, function, decoupled, surrogate)
    _, metrics = loaded(_small_inputs(), algorithm.loss)
    own = tuple(sorted(metrics.keys() - {*KNOWN_METRICS}))
    for metric in own:
        if not (isinstance(metric, str) and _METRIC.fullmatch(metric)):
            raise HookFailed(
                f"{SETTING} = {name} returned a metric named {metric!r}",
                "use lower-case letters, digits and _",
            )
    return replace(loaded, metrics=own)


def _versions(inputs: ObjectiveInputs) -> dict[str, int]:
    """Returns the number of changes in place of each tensor, as autograd counts them."""
    values = {name: getattr(inputs, name) for name in ObjectiveInputs.__slots__}
    return {name: v._version for name, v in values.items() if isinstance(v, Tensor)}


def _small_inputs() -> ObjectiveInputs:
    """Returns two samples of three tokens; the first token of each is not generated."""
    sample_T = torch.tensor([0, 0, 0, 1, 1, 1])
    mask_T = torch.tensor([False, True, True, False, True, True])
    logprobs_T = torch.where(mask_T, -1.0, 0.0)
    return ObjectiveInputs(
        logprobs_T=logprobs_T.clone().requires_grad_(),
        old_T=logprobs_T,
        behavior_T=logprobs_T,
        advantages_T=torch.where(mask_T, torch.where(sample_T == 0, 1.0, -1.0), 0.0),
        mask_T=mask_T,
        staleness_T=torch.zeros(6, dtype=torch.int32),
        sample_index=SampleIndex(sample_T, 2),
    )


# ---- built-in objectives


def decoupled_ppo(inputs: ObjectiveInputs, config: LossConfig) -> tuple[Tensor, Metrics]:
    """Returns PPO's clipped objective; arXiv 2505.24298, eq. 5."""
    return _clipped((inputs.logprobs_T - inputs.old_T).exp(), inputs.advantages_T, config)


def ppo(inputs: ObjectiveInputs, config: LossConfig) -> tuple[Tensor, Metrics]:
    """Returns the same against the behavior policy; arXiv 1707.06347, eq. 7."""
    return decoupled_ppo(inputs, config)


ppo.decoupled = False  # type: ignore[attr-defined]


def gspo(inputs: ObjectiveInputs, config: LossConfig) -> tuple[Tensor, Metrics]:
    """Returns the clipped objective with ratio and advantage of the sample; arXiv 2507.18071."""
    index, mask_T = inputs.sample_index, inputs.mask_T
    log_u_T = index.means(inputs.logprobs_T - inputs.old_T, mask_T)
    return _clipped(log_u_T.exp(), index.means(inputs.advantages_T, mask_T), config)


def cispo(inputs: ObjectiveInputs, config: LossConfig) -> tuple[Tensor, Metrics]:
    """Returns REINFORCE weighted by the clipped ratio: a clipped token keeps its gradient.

    Source: arXiv 2506.13585.
    """
    u_T = (inputs.logprobs_T - inputs.old_T).exp()
    clipped_T = _clip(u_T, config).detach()
    loss_T = -inputs.advantages_T * clipped_T * inputs.logprobs_T
    return loss_T, {"importance_weight": u_T, "clipped": clipped_T != u_T}


cispo.surrogate = True  # type: ignore[attr-defined]


def _clipped(u_T: Tensor, advantages_T: Tensor, config: LossConfig) -> tuple[Tensor, Metrics]:
    plain_T, clipped_T = -advantages_T * u_T, -advantages_T * _clip(u_T, config)
    loss_T = torch.maximum(plain_T, clipped_T)
    metrics = {"importance_weight": u_T, "clipped": clipped_T > plain_T}
    if config.dual_clip is not None:
        # Bounds a token of negative advantage and a much larger probability; it has no gradient
        # then.
        bound_T = config.dual_clip * advantages_T.abs()
        metrics["dual_clipped"] = loss_T > bound_T
        loss_T = torch.minimum(loss_T, bound_T)
    return loss_T, metrics


def _clip(u_T: Tensor, config: LossConfig) -> Tensor:
    return u_T.clamp(1 - config.clip_eps, 1 + (config.clip_eps_high or config.clip_eps))
