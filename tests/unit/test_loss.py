"""The loss against its formula as a loop over tokens in float64; logprobs against log_softmax."""

from __future__ import annotations

import math

import pytest
import torch
from config_builders import algorithm_config

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.trainer.algorithms.loss import LossInputs, policy_loss
from megatron_async_rl.trainer.model.logprobs import token_logprobs

CASES = {
    "decoupled": {},
    "cap off": {"behavior_weight_cap": None},
    "tight cap": {"behavior_weight_cap": 0.9},
    "asymmetric clip": {"clip_eps": 0.1, "clip_eps_high": 0.4},
    "dual clip": {"dual_clip": 1.5},
    "entropy": {"entropy_coef": 0.01},
    "naive": {"loss": "ppo"},
    "naive dual clip": {"loss": "ppo", "dual_clip": 1.2},
}


def algorithm(**settings: object) -> AlgorithmConfig:
    return algorithm_config(prompts_per_step=1, samples_per_prompt=2, **settings)


def inputs(seed: int, spread: float, length: int = 40) -> LossInputs:
    g = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(length, generator=g, dtype=torch.float64)

    behavior = -normal().abs()
    proximal = behavior + spread * normal()
    return LossInputs(
        logprobs_T=(proximal + spread * normal()).requires_grad_(),
        entropy_T=normal().abs().requires_grad_(),
        proximal_T=proximal,
        behavior_T=behavior,
        advantages_T=normal(),
        mask_T=torch.rand(length, generator=g) < 0.7,
        staleness_T=torch.randint(0, 4, (length,), generator=g),
    )


def reference(x: LossInputs, c: AlgorithmConfig) -> tuple[float, list[float], dict[str, float]]:
    """Returns the loss, its gradient by each logprob and the counts, token by token."""
    loss, gradient, counts = (
        0.0,
        [],
        {"clipped": 0, "dual_clipped": 0, "masked_by_cap": 0, "tokens": 0},
    )
    high = c.loss.clip_eps if c.loss.clip_eps_high is None else c.loss.clip_eps_high
    for t in range(len(x.mask_T)):
        gradient.append(0.0)
        if not x.mask_T[t]:
            continue
        counts["tokens"] += 1
        loss -= c.loss.entropy_coef * x.entropy_T[t].item()
        lp, behavior, a = x.logprobs_T[t].item(), x.behavior_T[t].item(), x.advantages_T[t].item()
        proximal = lp if x.proximal_T is None else x.proximal_T[t].item()
        w = 1.0 if c.loss.objective == "ppo" else math.exp(proximal - behavior)
        if (
            c.loss.objective != "ppo"
            and c.staleness_correction.behavior_weight_cap is not None
            and w > c.staleness_correction.behavior_weight_cap
        ):
            counts["masked_by_cap"] += 1
            continue
        u = math.exp(lp - (behavior if c.loss.objective == "ppo" else proximal))
        clipped = min(max(u, 1 - c.loss.clip_eps), 1 + high)
        term, slope = -a * u, -a * u  # d u / d lp = u
        if -a * clipped > term:
            term, slope = -a * clipped, 0.0
            counts["clipped"] += 1
        if c.loss.dual_clip is not None and term > c.loss.dual_clip * abs(a):
            term, slope = c.loss.dual_clip * abs(a), 0.0
            counts["dual_clipped"] += 1
        loss += w * term
        gradient[t] = w * slope
    return loss, gradient, counts


def check(x: LossInputs, c: AlgorithmConfig) -> dict[str, torch.Tensor]:
    loss, metrics = policy_loss(x, c)
    loss.backward()
    want, gradient, counts = reference(x, c)
    assert loss.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(
        x.logprobs_T.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    for name, count in counts.items():
        assert metrics[name].item() == count, name
    return metrics


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_counts_match_the_formula(case: str, spread: float) -> None:
    for seed in range(5):
        check(inputs(seed, spread), algorithm(**CASES[case]))


def test_missing_proximal_logprobs_use_the_current_policy() -> None:
    x = inputs(0, 0.5)
    same = LossInputs(**{f: getattr(x, f) for f in LossInputs.__slots__} | {"proximal_T": None})
    loss, _ = policy_loss(same, algorithm())
    given = LossInputs(
        **{f: getattr(x, f) for f in LossInputs.__slots__} | {"proximal_T": x.logprobs_T.detach()}
    )
    want, _ = policy_loss(given, algorithm())
    g, h = torch.autograd.grad(loss, x.logprobs_T)[0], torch.autograd.grad(want, x.logprobs_T)[0]
    assert torch.equal(loss, want) and torch.equal(g, h)


def test_behavior_weight_has_no_gradient() -> None:
    x = inputs(1, 0.3)
    proximal = x.logprobs_T.detach().clone().requires_grad_()
    loss, _ = policy_loss(
        LossInputs(**{f: getattr(x, f) for f in LossInputs.__slots__} | {"proximal_T": None}),
        algorithm(),
    )
    loss.backward()
    w = (proximal - x.behavior_T).exp()
    keep = x.mask_T & (w <= 5.0)
    torch.testing.assert_close(
        x.logprobs_T.grad, torch.where(keep, -x.advantages_T * w, 0.0).detach()
    )


def test_fully_masked_input_gives_zero_even_with_garbage() -> None:
    x = inputs(2, 1.0)
    garbage = torch.full_like(x.behavior_T, float("nan"))
    nothing = torch.zeros_like(x.mask_T)
    logprobs = torch.full_like(garbage, float("-inf")).requires_grad_()
    loss, metrics = policy_loss(
        LossInputs(logprobs, x.entropy_T, garbage, garbage, garbage, nothing, x.staleness_T),
        algorithm(),
    )
    loss.backward()
    assert loss.item() == 0 and metrics["tokens"].item() == 0
    assert torch.equal(logprobs.grad, torch.zeros_like(garbage))


def test_extreme_ratios_are_masked_by_the_cap_without_nan() -> None:
    x = inputs(3, 1.0)
    far = x.behavior_T + 1000.0  # exp overflows
    current = far.clone().requires_grad_()
    loss, metrics = policy_loss(
        LossInputs(
            current, x.entropy_T, far, x.behavior_T, x.advantages_T, x.mask_T, x.staleness_T
        ),
        algorithm(),
    )
    loss.backward()
    assert loss.item() == 0 and metrics["masked_by_cap"] == metrics["tokens"]
    assert torch.equal(current.grad, torch.zeros_like(far))


def test_tokens_masked_by_the_cap_count_in_the_normalizer() -> None:
    _, metrics = policy_loss(inputs(4, 3.0), algorithm(behavior_weight_cap=1.0))
    assert metrics["masked_by_cap"] > 0
    assert metrics["tokens"] == inputs(4, 3.0).mask_T.sum()


def test_mismatch_is_measured_on_current_tokens_only() -> None:
    x = inputs(5, 0.5)
    _, metrics = policy_loss(x, algorithm())
    chosen = x.mask_T & (x.staleness_T == 0)
    diff = (x.proximal_T - x.behavior_T).abs()[chosen]
    torch.testing.assert_close(metrics["logprob_diff"], diff.sum())
    torch.testing.assert_close(metrics["logprob_diff_max"], diff.max())
    assert metrics["current_tokens"] == chosen.sum()
    assert metrics["compared_tokens"] == chosen.sum()


def test_later_minibatches_do_not_count_as_mismatch() -> None:
    x = inputs(5, 0.5)
    fresh = {f: getattr(x, f) for f in LossInputs.__slots__} | {"proximal_T": None}
    _, first = policy_loss(LossInputs(**fresh), algorithm(loss="ppo"))
    _, later = policy_loss(LossInputs(**fresh | {"proximal_missing": True}), algorithm(loss="ppo"))
    assert first["logprob_diff_max"] > 0 and first["compared_tokens"] > 0
    assert later["logprob_diff_max"] == later["logprob_diff"] == later["compared_tokens"] == 0
    assert later["current_tokens"] == first["current_tokens"]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [7, 2100])  # one chunk; several
def test_logprobs_and_entropy_ignore_padded_vocabulary(tokens: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(tokens, 13, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 11, (tokens,), generator=g)
    logprobs, entropy = token_logprobs(logits, targets, vocab_size=11, temperature=temperature)
    full = torch.log_softmax(logits[:, :11] / temperature, -1)
    want = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    torch.testing.assert_close(logprobs, want[0])
    torch.testing.assert_close(entropy, want[1])
    weights = torch.randn(2, tokens, generator=g, dtype=torch.float64)
    (got,) = torch.autograd.grad(
        (weights[0] * logprobs).sum() + (weights[1] * entropy).sum(), logits
    )
    (expected,) = torch.autograd.grad(
        (weights[0] * want[0]).sum() + (weights[1] * want[1]).sum(), logits
    )
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[:, 11:], torch.zeros(tokens, 2, dtype=torch.float64))


def test_logits_are_unchanged_unless_overwriting_is_allowed() -> None:
    logits = torch.randn(5, 8, requires_grad=True)
    before = logits.detach().clone()
    logprobs, _ = token_logprobs(logits, torch.zeros(5, dtype=torch.int64), vocab_size=8)
    logprobs.sum().backward()
    assert torch.equal(logits, before)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), vocab_size=3)
    assert logprobs.item() == 0 and entropy.item() == 0 and logprobs.dtype == torch.float32
