"""Every algorithm against its formula, computed sample by sample in float64: value and gradient."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from config_builders import algorithm_config
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_async_rl.config.algorithm import AlgorithmConfig
from megatron_async_rl.controller.advantage import (
    BATCH_EPS,
    GROUP_EPS,
    overlong_share,
    sample_advantages,
)
from megatron_async_rl.trainer.algorithms.importance import (
    kl_reward_to_go,
    second_moment_cutoff,
)
from megatron_async_rl.trainer.algorithms.loss import LossInputs, policy_loss
from megatron_async_rl.trainer.data.sample_index import SampleIndex

CHOICES = {
    "loss": ["decoupled_ppo", "gspo", "cispo", "ppo"],
    "behavior_weight_level": ["token", "sequence"],
    "behavior_weight_action": ["mask", "truncate"],
}


def algorithm(**chosen: object) -> AlgorithmConfig:
    return algorithm_config(prompts_per_step=1, samples_per_prompt=4, **chosen)


# ---- advantages


def advantages_by_the_formula(
    rewards: list[list[float]], tokens: list[list[int]], c: AlgorithmConfig
) -> list[list[float]]:
    out = []
    for group in rewards:
        s = []
        for r in group:
            x = ((r - 0.5) * 2 - c.reward_shaping.bias) * c.reward_shaping.scale
            s.append(
                x
                if c.reward_shaping.clip is None
                else max(-c.reward_shaping.clip, min(c.reward_shaping.clip, x))
            )
        mean = sum(s) / len(s)
        if c.advantage.estimator == "grpo" and c.advantage.group_normalize:
            std = math.sqrt(sum((x - mean) ** 2 for x in s) / len(s))
            out.append([(x - mean) / (std + GROUP_EPS) for x in s])
        elif c.advantage.estimator == "dr_grpo":
            out.append([x - mean for x in s])
        elif c.advantage.estimator == "rloo":
            out.append([x - (sum(s) - x) / (len(s) - 1) if len(s) > 1 else 0.0 for x in s])
        else:
            out.append(s)
    if c.advantage.batch_normalize or c.advantage.estimator == "reinforce_pp":
        each = [
            a
            for row, ns in zip(out, tokens, strict=True)
            for a, n in zip(row, ns, strict=True)
            for _ in range(n)
        ]
        mean = sum(each) / len(each)
        std = math.sqrt(sum((a - mean) ** 2 for a in each) / len(each))
        out = [[(a - mean) / (std + BATCH_EPS) for a in row] for row in out]
    return out


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
@pytest.mark.parametrize(
    "extra", [{}, {"reward_clip": 0.5, "reward_scale": 5.0}, {"batch_normalize": True}]
)
@pytest.mark.parametrize("samples", [1, 2, 16])
def test_advantages_match_the_formula(
    advantage: str, extra: dict[str, object], samples: int
) -> None:
    c, rng = algorithm(advantage=advantage, **extra), np.random.default_rng(samples)
    rewards, tokens = rng.random((5, samples)), rng.integers(1, 50, (5, samples))
    rewards[0] = 1.0  # all equal
    want = advantages_by_the_formula(rewards.tolist(), tokens.tolist(), c)
    got = sample_advantages(rewards, tokens, c)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_critic_receives_the_shaped_reward() -> None:
    """Normalization settings do not apply: the trainer normalizes the advantages of GAE."""
    c = algorithm(
        advantage="gae", reward_scale=5.0, reward_bias=0.1, reward_clip=4.0, batch_normalize=True
    )
    assert np.allclose(
        sample_advantages([[1.0, 0.0], [0.5, 0.2]], np.ones((2, 2), int), c),
        [[4, -4], [-0.5, -3.5]],
    )


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_group_of_equal_rewards_or_one_sample_has_zero_advantage(advantage: str) -> None:
    for shape in [(3, 4), (3, 1)]:
        got = sample_advantages(np.ones(shape), np.ones(shape, int), algorithm(advantage=advantage))
        assert np.array_equal(got, np.zeros(shape))


def test_batch_normalization_weighs_samples_by_length() -> None:
    tokens, rewards = np.array([[1, 32768]]), np.array([[1.0, 0.0]])
    got = sample_advantages(rewards, tokens, algorithm(advantage="reinforce_pp"))
    assert (got * tokens).sum() == pytest.approx(0, abs=1e-6)
    assert got[0, 0] > 100 and abs(got[0, 1]) < 0.01


def test_overlong_penalty_rises_only_over_the_buffer() -> None:
    np.testing.assert_allclose(
        overlong_share(np.array([[1, 60, 80, 100, 120]]), 100, 40), [[0, 0, 0.5, 1, 1]]
    )
    c = algorithm(advantage="dr_grpo", overlong_buffer_tokens=40, overlong_penalty=2.0)
    got = sample_advantages(np.ones((1, 2)), np.array([[10, 100]]), c, max_new_tokens=100)
    np.testing.assert_allclose(got, [[1.0, -1.0]])


# ---- losses


def pack_of(
    lengths: list[int], seed: int, spread: float, masked: set[int] = frozenset()
) -> LossInputs:
    """Returns random logprobs of samples of these lengths; those in `masked` are fully masked."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    sample_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def normal() -> torch.Tensor:
        return torch.randn(total, generator=g, dtype=torch.float64)

    behavior = -normal().abs()
    proximal = behavior + spread * normal()
    mask = torch.rand(total, generator=g) < 0.8
    for sample in masked:
        mask &= sample_T != sample
    return LossInputs(
        logprobs_T=(proximal + spread * normal()).requires_grad_(),
        entropy_T=normal().abs(),
        proximal_T=proximal,
        behavior_T=behavior,
        advantages_T=torch.randn(len(lengths), generator=g, dtype=torch.float64)[sample_T],
        mask_T=mask,
        staleness_T=torch.randint(0, 4, (total,), generator=g),
        sample_index=SampleIndex(sample_T, len(lengths)),
        reference_T=proximal + normal(),
    )


def loss_by_the_formula(x: LossInputs, c: AlgorithmConfig) -> torch.Tensor:
    """Computes the formulas sample by sample, differentiable in x.logprobs_T."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(x.sample_index.num_samples):
        chosen = (x.sample_index.sample_T == sample) & x.mask_T
        if not chosen.any():
            continue
        lp, behavior, a = x.logprobs_T[chosen], x.behavior_T[chosen], x.advantages_T[chosen]
        if x.proximal_T is not None:
            proximal = x.proximal_T[chosen]
        elif c.staleness_correction.proximal == "loglinear":
            alpha = x.staleness_T[chosen] / (x.staleness_T[chosen] + 1.0)
            proximal = (1 - alpha) * behavior + alpha * lp.detach()
        else:
            proximal = lp.detach()
        low, high = 1 - c.loss.clip_eps, 1 + (c.loss.clip_eps_high or c.loss.clip_eps)
        w, keep, old = torch.ones_like(a), torch.ones_like(a, dtype=torch.bool), behavior
        if c.loss.objective != "ppo":
            old = proximal
            w = (proximal - behavior).exp()
            if c.staleness_correction.behavior_weight_level == "sequence":
                w = w.log().mean().exp().expand(len(a))
            beyond = torch.zeros_like(keep)
            if c.staleness_correction.behavior_weight_cap is not None:
                beyond |= w > c.staleness_correction.behavior_weight_cap
            if c.staleness_correction.behavior_weight_floor is not None:
                beyond |= w < c.staleness_correction.behavior_weight_floor
            if c.staleness_correction.behavior_weight_action == "mask":
                keep = ~beyond
            else:
                w = w.clamp(
                    c.staleness_correction.behavior_weight_floor or 0.0,
                    c.staleness_correction.behavior_weight_cap or math.inf,
                )
        u = (lp - old).exp()
        if c.loss.objective == "gspo":
            u = ((lp - old).sum() / len(a)).exp().expand(len(a))
        term = (
            -u.detach().clamp(low, high) * a * lp
            if c.loss.objective == "cispo"
            else -torch.minimum(u * a, u.clamp(low, high) * a)
        )
        total = total + (w * term)[keep].sum()
        if c.kl.coef and c.kl.apply_to == "loss":
            d = x.reference_T[chosen] - lp
            total = (
                total + c.kl.coef * (d**2 / 2 if c.kl.estimator == "k2" else d.exp() - d - 1).sum()
            )
    return total


def check_policy_loss(x: LossInputs, c: AlgorithmConfig) -> dict[str, torch.Tensor]:
    loss, metrics = policy_loss(x, c)
    (gradient,) = torch.autograd.grad(loss, x.logprobs_T)
    want = loss_by_the_formula(x, c)
    expected = torch.zeros_like(gradient)
    if want.requires_grad:
        (expected,) = torch.autograd.grad(want, x.logprobs_T)
    assert loss.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    return metrics


@pytest.mark.parametrize("level", CHOICES["behavior_weight_level"])
@pytest.mark.parametrize("action", CHOICES["behavior_weight_action"])
@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_losses_and_corrections_match_the_formula(loss: str, action: str, level: str) -> None:
    for seed, (cap, floor) in enumerate([(5.0, None), (1.1, 0.9), (None, None), (None, 0.8)]):
        for spread in (0.0, 0.1, 1.0):
            c = algorithm(
                loss=loss,
                behavior_weight_level=level,
                behavior_weight_action=action,
                behavior_weight_cap=cap,
                behavior_weight_floor=floor,
                clip_eps_high=0.28,
            )
            check_policy_loss(pack_of([1, 7, 30, 4, 2], seed, spread, masked={3}), c)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from(CHOICES["loss"]),
)
@settings(max_examples=50, deadline=None)
def test_losses_match_the_formula_for_any_lengths(lengths: list[int], seed: int, loss: str) -> None:
    check_policy_loss(
        pack_of(lengths, seed, 0.3), algorithm(loss=loss, behavior_weight_level="sequence")
    )


@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_losses_match_for_32k_tokens_beside_one_token(loss: str) -> None:
    check_policy_loss(
        pack_of([32768, 1], 0, 0.2), algorithm(loss=loss, behavior_weight_level="sequence")
    )


@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_fully_masked_samples_add_no_loss_and_no_nan(loss: str) -> None:
    x = pack_of([5, 9], 0, 0.5, masked={0, 1})
    value, _ = policy_loss(x, algorithm(loss=loss, behavior_weight_level="sequence", kl_coef=0.1))
    value.backward()
    assert value.item() == 0 and torch.equal(x.logprobs_T.grad, torch.zeros_like(x.behavior_T))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_loss_matches_the_formula(estimator: str) -> None:
    c = algorithm(kl_coef=0.3, kl_estimator=estimator)
    metrics = check_policy_loss(pack_of([6, 20], 1, 0.3), c)
    assert metrics["reference_kl"] > 0


def test_kl_in_reward_adds_the_kl_of_later_tokens() -> None:
    x = pack_of([3, 10, 1, 5], 2, 0.5)
    got = kl_reward_to_go(x.behavior_T, x.reference_T, x.mask_T, x.sample_index)
    for t in range(len(got)):
        later = [
            (x.behavior_T[s] - x.reference_T[s]).item()
            for s in range(t, len(got))
            if x.sample_index.sample_T[s] == x.sample_index.sample_T[t] and x.mask_T[s]
        ]
        assert got[t].item() == pytest.approx(sum(later) if x.mask_T[t] else 0.0, abs=1e-9)


@pytest.mark.parametrize("loss", ["decoupled_ppo", "gspo", "cispo"])
def test_loglinear_interpolates_by_staleness(loss: str) -> None:
    x = pack_of([6, 20, 3], 3, 0.4)
    x = LossInputs(**{f: getattr(x, f) for f in LossInputs.__slots__} | {"proximal_T": None})
    check_policy_loss(x, algorithm(loss=loss, proximal="loglinear"))


def test_loglinear_uses_engine_logprobs_for_fresh_tokens() -> None:
    x = pack_of([20], 4, 0.4)
    fresh = {"proximal_T": None, "staleness_T": torch.zeros_like(x.staleness_T)}
    x = LossInputs(**{f: getattr(x, f) for f in LossInputs.__slots__} | fresh)
    _, metrics = policy_loss(x, algorithm(proximal="loglinear"))
    assert metrics["behavior_weight"] == metrics["tokens"]  # w = 1
    assert metrics["logprob_diff"] > 0  # the mismatch still compares trainer and engine


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 8, width=32), st.sampled_from([0.0, 0.5, 2.0])), max_size=40),
    st.sampled_from([0.01, 0.04, 0.5, 3.0]),
)
def test_m2po_masks_the_largest_ratios_until_the_mean_fits(
    squares: list[float], threshold: float
) -> None:
    cutoff = second_moment_cutoff(torch.tensor(squares, dtype=torch.float32), threshold)
    left = sorted(squares)
    while left and sum(left) > threshold * len(left):
        largest = left[-1]
        left = [x for x in left if x < largest]  # equal ones are masked together
    assert [x for x in sorted(squares) if x <= cutoff] == left


def test_m2po_over_ranks_equals_m2po_of_the_batch() -> None:
    whole = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 8
    alone = second_moment_cutoff(whole, 0.04)
    assert 0 < alone < whole.max()
    parts, barrier = [whole[:300], whole[300:], whole[:0]], threading.Barrier(3)
    given: list[torch.Tensor] = [torch.zeros(2)] * 3
    cutoffs = [0.0] * 3

    def one_rank(rank: int) -> None:
        def total(sums: torch.Tensor) -> torch.Tensor:
            given[rank] = sums
            barrier.wait(20)
            result = given[0] + given[1] + given[2]
            barrier.wait(20)
            return result

        cutoffs[rank] = second_moment_cutoff(parts[rank], 0.04, total)

    ranks = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert cutoffs == [alone] * 3


def test_m2po_masks_infinity_and_accepts_empty_batches() -> None:
    assert second_moment_cutoff(torch.tensor([float("inf"), 0.01]), 0.04) < float("inf")
    assert second_moment_cutoff(torch.empty(0), 0.04) > 1e38


def test_masked_token_has_no_gradient() -> None:
    inputs, c = pack_of([4, 1, 9], 0, 0.5), algorithm(behavior_weight_cap=None)
    m2_mask_T = torch.arange(len(inputs.mask_T)) % 3 > 0
    logprobs_T = inputs.logprobs_T.detach().clone().requires_grad_()
    loss, metrics = policy_loss(replace(inputs, logprobs_T=logprobs_T, m2_mask_T=m2_mask_T), c)
    loss.backward()
    assert logprobs_T.grad is not None and not logprobs_T.grad[~m2_mask_T].any()
    assert metrics["masked_by_cap"] == (inputs.mask_T & ~m2_mask_T).sum()
    assert metrics["tokens"] == inputs.mask_T.sum()  # counted before tokens are masked


def test_gspo_clips_whole_samples() -> None:
    x = pack_of([8, 8], 5, 0.0)
    moved = x.logprobs_T.detach() + torch.where(x.sample_index.sample_T == 0, 1.0, 0.0)
    x = LossInputs(
        **{f: getattr(x, f) for f in LossInputs.__slots__}
        | {"logprobs_T": moved.requires_grad_(), "advantages_T": torch.ones_like(moved)}
    )
    loss, metrics = policy_loss(x, algorithm(loss="gspo"))
    loss.backward()
    first = x.sample_index.sample_T == 0
    assert metrics["clipped"] == (first & x.mask_T).sum()
    assert not x.logprobs_T.grad[first].any() and x.logprobs_T.grad[~first & x.mask_T].all()


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    x = pack_of([30], 6, 2.0)
    loss, metrics = policy_loss(x, algorithm(loss="cispo", behavior_weight_cap=None))
    loss.backward()
    assert metrics["clipped"] > 0 and x.logprobs_T.grad[x.mask_T].all()
