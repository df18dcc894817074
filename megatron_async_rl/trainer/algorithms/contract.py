"""Checks the properties of a policy objective that the trainer relies on; for selftest.

    for check, problem in objective_checks(config.algorithm):  # problem: "" if it holds
        ...

The objective is called through policy_loss, without entropy and KL terms. A wrong sign or a wrong
formula cannot be found: both are consistent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.errors import HookFailed
from megatron_async_rl.trainer.algorithms import objectives
from megatron_async_rl.trainer.algorithms.loss import LossInputs, policy_loss
from megatron_async_rl.trainer.data.sample_index import SampleIndex

TOLERANCE = 1e-9  # of the largest entry
DIFFERENCE_TOLERANCE = 1e-5  # of finite differences, which have rounding errors
STEP = 1e-6  # of finite differences
SHARD_TIMEOUT_S = 5.0
_LENGTHS = (9, 4, 17, 1, 6, 12)
_PREREQUISITES = ("finite", "repeatable", "gradient", "cuts")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample; tensors [T] as in LossInputs."""

    logprobs_T: Tensor
    proximal_T: Tensor
    behavior_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor
    staleness_T: Tensor

    def chosen(self, index: Tensor) -> Tokens:
        return Tokens(*(getattr(self, name)[index] for name in self.__slots__))


Pack = Sequence[Tokens]


def objective_checks(algorithm: AlgorithmConfig) -> Iterator[tuple[str, str]]:
    """Yields (name of the check, problem), the problem empty if it passes.

    Ends where a problem makes the following checks meaningless. Raises ConfigError or HookFailed if
    the objective cannot be loaded or called.
    """
    objective = objectives.load(algorithm)
    tree = msgspec.to_builtins(algorithm)
    tree["loss"]["entropy_coef"] = tree["kl"]["coef"] = 0.0
    algorithm = msgspec.convert(tree, AlgorithmConfig)
    checks: dict[str, Callable[[AlgorithmConfig], str]] = {
        "finite": _not_finite,
        "repeatable": _not_repeatable,
        "gradient": _no_gradient,
        "finite differences": _other_differences,
        "masked tokens": _masked_tokens_matter,
        "other samples": _other_samples_matter,
        "order": _order_matters,
        "cuts": _cuts_matter,
        "context parallelism": _shards_matter,
    }
    if objective.surrogate:
        del checks["finite differences"]
    for name, check in checks.items():
        try:
            problem = check(algorithm)
        except HookFailed as e:
            problem = str(e).partition("\n")[0]
        yield name, problem
        if problem and name in _PREREQUISITES:
            return


def sign_note(algorithm: AlgorithmConfig) -> str:
    """Returns a note if a step would make tokens of positive advantage less likely, or ""."""
    pack = samples(0.0)
    _, gradient = _evaluated(pack, algorithm)
    advantages_T = torch.where(_joined(pack, "mask_T"), _joined(pack, "advantages_T"), 0.0)
    if (gradient * advantages_T).sum() <= 0:
        return ""
    return (
        "the gradient makes tokens of positive advantage less likely; the trainer minimises the "
        "loss: is the sign right?"
    )


def samples(spread: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tokens]:
    """Returns random samples, of log ratios with this standard deviation; the last is masked."""
    g = torch.Generator().manual_seed(seed)

    def sample(length: int, masked: bool) -> Tokens:
        def normal() -> Tensor:
            return torch.randn(length, generator=g, dtype=dtype)

        behavior_T = -normal().abs()
        proximal_T = behavior_T + spread * normal()
        return Tokens(
            logprobs_T=proximal_T + spread * normal(),
            proximal_T=proximal_T,
            behavior_T=behavior_T,
            advantages_T=normal()[:1].expand(length),
            mask_T=(torch.rand(length, generator=g) < 0.8) & (not masked),
            staleness_T=torch.randint(0, 4, (length,), generator=g),
        )

    return [sample(n, n == _LENGTHS[-1]) for n in _LENGTHS]


# ---- the checks: each returns a problem, or ""


def _not_finite(algorithm: AlgorithmConfig) -> str:
    packs = {
        "tokens of the current policy": samples(0.0),
        "tokens of an older policy": samples(0.3),
        "tokens of a very different policy": samples(3.0),
        "advantages of 0": [replace(s, advantages_T=s.advantages_T * 0) for s in samples(0.3)],
        "no generated token": [replace(s, mask_T=s.mask_T & False) for s in samples(0.3)],
        "float32": samples(0.3, dtype=torch.float32),
    }
    for what, pack in packs.items():
        loss, gradient = _evaluated(pack, algorithm)
        if not loss.isfinite():
            return f"the loss is {loss.item()} for {what}"
        if not gradient.isfinite().all():
            return f"the gradient is not finite for {what}"
    return ""


def _not_repeatable(algorithm: AlgorithmConfig) -> str:
    first, second = (_evaluated(samples(0.3), algorithm) for _ in range(2))
    if torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]):
        return ""
    return "two calls with the same inputs differ; use no random numbers and keep no state"


def _no_gradient(algorithm: AlgorithmConfig) -> str:
    pack = samples(0.3)
    if _evaluated(pack, algorithm)[1].any():
        return ""
    return "no gradient reaches inputs.logprobs_T; do not detach it or leave it out"


def _other_differences(algorithm: AlgorithmConfig) -> str:
    pack = samples(0.3)
    _, gradient_T = _evaluated(pack, algorithm)
    logprobs_T, estimates = _joined(pack, "logprobs_T"), []
    for t in range(len(logprobs_T)):
        ends = []
        for step in (-STEP, STEP):
            moved_T = logprobs_T.clone()
            moved_T[t] += step
            ends.append(policy_loss(_inputs(pack, moved_T), algorithm)[0].item())
        estimates.append((ends[1] - ends[0]) / (2 * STEP))
    worst = (gradient_T - torch.tensor(estimates, dtype=torch.float64)).abs().max().item()
    if worst <= DIFFERENCE_TOLERANCE * _scale(gradient_T):
        return ""
    return (
        f"the gradient differs from finite differences by {worst:.2g}; if a factor is detached on "
        "purpose, set the function's attribute `surrogate = True`"
    )


def _masked_tokens_matter(algorithm: AlgorithmConfig) -> str:
    pack, others = samples(0.3), samples(2.0, seed=1)
    want = _of_generated(pack, algorithm)
    garbage = [_with_garbage(s, other) for s, other in zip(pack, others, strict=True)]
    padding = [replace(s, mask_T=s.mask_T & False) for s in others]
    longer = [_joined_samples(s, p) for s, p in zip(pack, padding, strict=True)]
    for changed in (garbage, [*pack, padding[0]], longer):
        if problem := _difference(_of_generated(changed, algorithm), want):
            return f"{problem} with other masked tokens or more padding; use inputs.mask_T"
    return ""


def _other_samples_matter(algorithm: AlgorithmConfig) -> str:
    pack, others = samples(0.3), samples(0.5, seed=1)
    changed = [replace(others[0], mask_T=pack[0].mask_T), *pack[1:]]
    start = len(pack[0].mask_T)
    want, got = (_evaluated(p, algorithm)[1][start:] for p in (pack, changed))
    if _is_close(got, want):
        return ""
    return "a sample's gradient depends on the values of another sample in the micro-batch"


def _cuts_matter(algorithm: AlgorithmConfig) -> str:
    pack = samples(0.3)
    parts = [_evaluated(part, algorithm) for part in (pack[:2], pack[2:3], pack[3:])]
    got = torch.stack([loss for loss, _ in parts]).sum(), torch.cat([g for _, g in parts])
    if problem := _difference(got, _evaluated(pack, algorithm)):
        return (
            f"{problem} if the samples are cut into other micro-batches; return the loss of each "
            "token, and divide by no number of tokens or samples: the trainer does"
        )
    return ""


def _order_matters(algorithm: AlgorithmConfig) -> str:
    pack = samples(0.3)
    loss, gradient_T = _evaluated(pack[::-1], algorithm)
    back = torch.cat(gradient_T.split([len(s.mask_T) for s in pack[::-1]])[::-1])
    if problem := _difference((loss, back), _evaluated(pack, algorithm)):
        return f"{problem} if the samples are packed in another order"
    return ""


def _shards_matter(algorithm: AlgorithmConfig) -> str:
    """Splits each sample over two ranks as context parallelism does: chunks 0 and 3, 1 and 2."""
    pack = samples(0.3)
    leaves_T = [s.logprobs_T.clone().requires_grad_() for s in pack]
    pack = [replace(s, logprobs_T=x_T) for s, x_T in zip(pack, leaves_T, strict=True)]
    sums = _SumOverRanks()

    def loss_of(rank: int) -> Tensor:
        shards = []
        for s in pack:
            chunks = torch.arange(len(s.mask_T)).tensor_split(4)
            shards.append(s.chosen(torch.cat([chunks[rank], chunks[3 - rank]])))
        inputs = _inputs(shards)
        assert inputs.sample_index is not None
        index = replace(inputs.sample_index, reduce=lambda x: sums.reduce(rank, x))
        try:
            return policy_loss(replace(inputs, sample_index=index), algorithm)[0]
        except BaseException:
            sums.barrier.abort()
            raise

    with ThreadPoolExecutor(2) as ranks:
        futures = [ranks.submit(loss_of, rank) for rank in range(2)]
    if any(isinstance(f.exception(), threading.BrokenBarrierError) for f in futures):
        return "the ranks make different numbers of calls of inputs.sample_index"
    loss = torch.stack([f.result() for f in futures]).sum()
    got = loss.detach(), torch.cat(torch.autograd.grad(loss, leaves_T))
    if problem := _difference(got, _evaluated(pack, algorithm)):
        return (
            f"{problem} if samples are split over ranks; combine tokens of a sample by "
            "inputs.sample_index only"
        )
    return ""


# ---- inside


class _SumOverRanks:
    """Adds up tensors of two threads, differentiably, like context_parallel_sum those of ranks."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=SHARD_TIMEOUT_S)
        self._parts: dict[int, Tensor] = {}

    def reduce(self, rank: int, x: Tensor) -> Tensor:
        self._parts[rank] = x
        self.barrier.wait()
        total = self._parts[0] + self._parts[1]
        self.barrier.wait()
        return total


def _evaluated(pack: Pack, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Returns (loss, gradient by logprobs [T], 0 if there is none)."""
    logprobs_T = _joined(pack, "logprobs_T").detach().requires_grad_()
    loss, _ = policy_loss(_inputs(pack, logprobs_T), algorithm)
    if not loss.requires_grad:
        return loss, torch.zeros_like(logprobs_T)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T, materialize_grads=True)
    return loss.detach(), gradient_T


def _of_generated(pack: Pack, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Returns (loss, gradient of the tokens that are not masked)."""
    loss, gradient_T = _evaluated(pack, algorithm)
    return loss, gradient_T[_joined(pack, "mask_T")]


def _inputs(pack: Pack, logprobs_T: Tensor | None = None) -> LossInputs:
    joined = {name: _joined(pack, name) for name in Tokens.__slots__}
    if logprobs_T is not None:
        joined["logprobs_T"] = logprobs_T
    lengths = torch.tensor([len(s.mask_T) for s in pack])
    sample_T = torch.arange(len(pack)).repeat_interleave(lengths)
    return LossInputs(
        **joined,
        entropy_T=torch.zeros_like(joined["logprobs_T"]),
        sample_index=SampleIndex(sample_T, len(pack)),
    )


def _joined(pack: Pack, name: str) -> Tensor:
    return torch.cat([getattr(s, name) for s in pack])


def _joined_samples(first: Tokens, second: Tokens) -> Tokens:
    return Tokens(*(_joined((first, second), name) for name in Tokens.__slots__))


def _with_garbage(s: Tokens, other: Tokens) -> Tokens:
    """Returns the sample with the other's values where it is masked."""
    names = [name for name in Tokens.__slots__ if name != "mask_T"]
    values = {n: torch.where(s.mask_T, getattr(s, n), getattr(other, n)) for n in names}
    return replace(s, **values)


def _difference(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> str:
    for what, a, b in zip(("loss", "gradient"), got, want, strict=True):
        if not _is_close(a, b):
            return f"the {what} differs by {(a - b).abs().max().item():.2g}"
    return ""


def _is_close(got: Tensor, want: Tensor) -> bool:
    return bool(((got - want).abs() <= TOLERANCE * _scale(want)).all())


def _scale(x: Tensor) -> float:
    return max(x.abs().max().item(), 1.0) if x.numel() else 1.0
