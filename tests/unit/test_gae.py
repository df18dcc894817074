"""GAE and the critic's loss against the papers' formulas, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_async_rl.trainer.algorithms.gae import (
    discounted_sums,
    generalized_advantages,
    value_loss,
)
from megatron_async_rl.trainer.data.sample_index import SampleIndex

EPS = 0.2


def packed(masks: list[list[bool]]) -> tuple[Tensor, SampleIndex]:
    mask_T = torch.tensor([m for mask in masks for m in mask], dtype=torch.bool)
    owner_T = torch.tensor([n for n, mask in enumerate(masks) for _ in mask], dtype=torch.int64)
    return mask_T, SampleIndex(owner_T, len(masks))


def by_the_formula(
    masks: list[list[bool]], values_T: Tensor, rewards_T: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Computes delta and the sum over later tokens as in the paper, one action after another."""
    advantages_T, returns_T = torch.zeros_like(values_T), torch.zeros_like(values_T)
    start = 0
    for mask in masks:
        actions = [start + n for n, taken in enumerate(mask) if taken]
        for i, t in enumerate(actions):
            total = 0.0
            for k, now in enumerate(actions[i:], i):
                after = values_T[actions[k + 1]] if k + 1 < len(actions) else 0.0
                total = total + (gamma * lam) ** (k - i) * (
                    rewards_T[now] + gamma * after - values_T[now]
                )
            advantages_T[t], returns_T[t] = total, total + values_T[t]
        start += len(mask)
    return advantages_T, returns_T


@settings(deadline=None, max_examples=60)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6),
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    seed=st.integers(0, 99),
)
def test_advantages_and_returns_match_the_formula(
    masks: list[list[bool]], gamma: float, lam: float, seed: int
) -> None:
    """Turns are gaps in the mask; some samples are fully masked or have one token."""
    mask_T, owners = packed(masks)
    g = torch.Generator().manual_seed(seed)
    values_T, rewards_T = torch.randn(2, len(mask_T), generator=g, dtype=torch.float64)
    got = generalized_advantages(values_T, rewards_T, mask_T, owners, gamma, lam)
    want = by_the_formula(masks, values_T, rewards_T, gamma, lam)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def runs_of(mask: list[bool]) -> list[list[int]]:
    """Returns the turns: the runs of True."""
    runs: list[list[int]] = []
    for n, taken in enumerate(mask):
        if taken and n and mask[n - 1]:
            runs[-1].append(n)
        elif taken:
            runs.append([n])
    return runs


@settings(deadline=None, max_examples=60)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    seed=st.integers(0, 99),
)
def test_turns_as_actions_match_the_formula(
    masks: list[list[bool]], gamma: float, lam: float, seed: int
) -> None:
    """Turns of one token give the same as tokens, so the formula's turns are cut to one token."""
    mask_T, owners = packed(masks)
    g = torch.Generator().manual_seed(seed)
    values_T, rewards_T = torch.randn(2, len(mask_T), generator=g, dtype=torch.float64)
    got = generalized_advantages(values_T, rewards_T, mask_T, owners, gamma, lam, of_turns=True)
    start, short, runs, rewards = 0, [], [], torch.zeros_like(rewards_T)
    for mask in masks:
        short.append([taken and not (n and mask[n - 1]) for n, taken in enumerate(mask)])
        for run in runs_of(mask):
            runs.append([start + n for n in run])
            rewards[runs[-1][0]] = sum(rewards_T[n] for n in runs[-1])
        start += len(mask)
    want = by_the_formula(short, values_T, rewards, gamma, lam)
    for a_T, b_T in zip(got, want, strict=True):
        for run in runs:
            b_T[run] = b_T[run[0]].clone()
        torch.testing.assert_close(a_T, b_T, rtol=1e-12, atol=1e-12)


def test_turns_of_one_token_are_tokens() -> None:
    mask_T, owners = packed([[True, False, True, False, True], [False, True]])
    values_T, rewards_T = torch.randn(2, 7, dtype=torch.float64)
    arguments = (values_T, rewards_T, mask_T, owners, 0.9, 0.8)
    of_tokens = generalized_advantages(*arguments)
    of_turns = generalized_advantages(*arguments, of_turns=True)
    assert all(torch.equal(a, b) for a, b in zip(of_tokens, of_turns, strict=True))


def test_turns_without_critic_get_the_rewards_to_go() -> None:
    mask_T, owners = packed([[False, True, True, False, True], [True, True]])
    rewards_T = torch.tensor([0.0, 0, 1, 0, 4, 0, 8], dtype=torch.float64)
    arguments = (torch.zeros(7), rewards_T, mask_T, owners)
    advantages_T, _ = generalized_advantages(*arguments, 1.0, 1.0, of_turns=True)
    assert advantages_T.tolist() == [0, 5, 5, 0, 4, 8, 8]
    advantages_T, _ = generalized_advantages(*arguments, 0.5, 1.0, of_turns=True)
    assert advantages_T.tolist() == [0, 3, 3, 0, 4, 8, 8]  # discounted per turn
    advantages_T, _ = generalized_advantages(*arguments, 0.0, 1.0, of_turns=True)
    assert advantages_T.tolist() == [0, 1, 1, 0, 4, 8, 8]


def test_without_critic_every_token_gets_the_reward() -> None:
    """gamma = lambda = 1 and V = 0, as with the estimators without a critic."""
    mask_T, owners = packed(
        [[False, True, True, True, False], [True], [False, False], [True, False, True]]
    )
    rewards_T = torch.tensor([0.0, 0, 0, 5, 0, -5, 0, 0, 0, 0, 2], dtype=torch.float64)
    advantages_T, returns_T = generalized_advantages(
        torch.zeros(11), rewards_T, mask_T, owners, 1.0, 1.0
    )
    assert advantages_T.tolist() == returns_T.tolist() == [0, 5, 5, 5, 0, -5, 0, 0, 2, 0, 2]


def test_perfect_critic_gives_zero_advantage() -> None:
    mask_T, owners = packed([[True] * 5, [True] * 3])
    rewards_T = torch.tensor([0.0] * 4 + [1.0] + [0.0] * 2 + [-2.0])
    values_T = torch.tensor(
        [0.9**4, 0.9**3, 0.9**2, 0.9, 1.0, -2 * 0.81, -2 * 0.9, -2.0], dtype=torch.float64
    )
    advantages_T, returns_T = generalized_advantages(values_T, rewards_T, mask_T, owners, 0.9, 0.7)
    assert advantages_T.abs().max() < 1e-12
    torch.testing.assert_close(returns_T, values_T)


def test_padding_and_tokens_between_turns_are_ignored() -> None:
    masks = [[False, True, False, False, True, True], [False] * 4]
    mask_T, owners = packed(masks)
    values_T, rewards_T = torch.randn(2, 10, dtype=torch.float64)
    want = generalized_advantages(values_T, rewards_T, mask_T, owners, 0.9, 0.9)
    poisoned = [torch.where(mask_T, x, float("nan")) for x in (values_T, rewards_T)]
    got = generalized_advantages(*poisoned, mask_T, owners, 0.9, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 32768])
def test_discounted_sums_match_the_recurrence(length: int) -> None:
    x_K = torch.randn(length + 3, dtype=torch.float64)
    owner_K = torch.cat([torch.zeros(length, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    want, after = x_K.clone(), 0.0
    for k in range(length - 1, -1, -1):
        after = want[k] = x_K[k] + 0.999 * after
    for k in (length + 1, length):
        want[k] = x_K[k] + 0.999 * want[k + 1]
    torch.testing.assert_close(discounted_sums(x_K, owner_K, 0.999), want, rtol=1e-11, atol=1e-11)


def test_empty_input_gives_empty_output() -> None:
    mask_T, owners = packed([[False, False]])
    advantages_T, returns_T = generalized_advantages(
        torch.ones(2), torch.ones(2), mask_T, owners, 1.0, 1.0
    )
    assert advantages_T.tolist() == returns_T.tolist() == [0, 0]


@pytest.mark.parametrize("clip_eps", [EPS, None])
@pytest.mark.parametrize("seed", range(5))
def test_value_loss_and_gradient_match_the_formula(clip_eps: float | None, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values_T, old_T, returns_T = (torch.randn(3, 24, generator=g, dtype=torch.float64)) * 0.5
    mask_T = torch.rand(24, generator=g) < 0.6
    values_T.requires_grad_()
    total, gradient = 0.0, torch.zeros(24, dtype=torch.float64)
    for t in mask_T.nonzero()[:, 0].tolist():
        v, old, r = values_T[t].item(), old_T[t].item(), returns_T[t].item()
        plain, clipped = (v - r) ** 2, -1.0
        if clip_eps is not None:
            clipped = (old + min(max(v - old, -clip_eps), clip_eps) - r) ** 2
        total += max(plain, clipped) / 2
        inside = clip_eps is None or abs(v - old) < clip_eps
        gradient[t] = v - r if plain >= clipped or inside else 0.0
    loss, sums = value_loss(values_T, old_T, returns_T, mask_T, clip_eps)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(values_T.grad, gradient, rtol=1e-12, atol=1e-12)
    assert sums["tokens"] == mask_T.sum() and sums["value_loss"] == pytest.approx(total)
    assert sums["error_squared"] == pytest.approx(
        (values_T - returns_T)[mask_T].square().sum().item()
    )


def test_fully_masked_pack_gives_zero_value_loss() -> None:
    values_T = torch.full((4,), float("nan"), requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.bool)
    loss, sums = value_loss(values_T, torch.full((4,), float("inf")), torch.ones(4), nothing, EPS)
    loss.backward()
    assert loss.item() == 0 and values_T.grad is not None and values_T.grad.tolist() == [0.0] * 4
    assert all(value.item() == 0 for value in sums.values())
