"""The contract of objectives and advantages: built-in ones keep it, each planted fault is named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from config_builders import algorithm_config

from megatron_async_rl import hooks
from megatron_async_rl.cli.hook_checks import advantage_checks
from megatron_async_rl.config.algorithm import AdvantageConfig, AlgorithmConfig, FilterConfig
from megatron_async_rl.controller.advantage import (
    check_estimator,
    sample_advantages,
    shaped_rewards,
    token_means,
)
from megatron_async_rl.errors import ConfigError, HookFailed
from megatron_async_rl.trainer.algorithms import contract, objectives
from megatron_async_rl.trainer.algorithms.loss import SUMS, policy_loss, sum_names

OBJECTIVES = """
import torch

def good(inputs, config):
    ratio_T = (inputs.logprobs_T - inputs.old_T).exp()
    return -inputs.advantages_T * ratio_T, {"far": (ratio_T - 1).abs() > 0.1}

def loss(inputs, config):
    return good(inputs, config)[0]

def nan_for_fresh_tokens(inputs, config):
    return loss(inputs, config).where(inputs.staleness_T > 0, float("nan"))

def random(inputs, config):
    return loss(inputs, config) * torch.rand(())

def detached(inputs, config):
    return loss(inputs, config).detach()

def half_detached(inputs, config):
    return loss(inputs, config) * (inputs.logprobs_T - inputs.old_T).exp().detach()

def uses_padding(inputs, config):
    return loss(inputs, config) * inputs.mask_T.float().mean()

def normalised_by_cut(inputs, config):
    return loss(inputs, config) / inputs.mask_T.sum().clamp(min=1)

def centered_over_samples(inputs, config):
    mean = inputs.advantages_T.sum() / inputs.mask_T.sum().clamp(min=1)
    return (mean - inputs.advantages_T) * inputs.logprobs_T

def by_position(inputs, config):
    return loss(inputs, config) * inputs.sample_index.sample_T

def sum_of_own_shard(inputs, config):
    index, mask_T = inputs.sample_index, inputs.mask_T
    sums_N = torch.zeros(index.num_samples, dtype=inputs.logprobs_T.dtype)
    sums_N = sums_N.index_add(0, index.sample_T, inputs.logprobs_T)
    return -inputs.advantages_T * sums_N[index.sample_T]

def summed(inputs, config):
    return loss(inputs, config).sum()

def float_metric(inputs, config):
    return loss(inputs, config), {"clipped": inputs.logprobs_T}

def named_metric(inputs, config):
    return loss(inputs, config), {"Far away": inputs.mask_T}

def number_metric(inputs, config):
    return loss(inputs, config), {"far": 1.0}

def in_place(inputs, config):
    inputs.advantages_T.mul_(2)
    return loss(inputs, config)

def nothing(inputs, config):
    return None

def raises(inputs, config):
    raise KeyError("width")

def wrong_sign(inputs, config):
    return -loss(inputs, config)

def plain(inputs, config):
    return -inputs.advantages_T * (inputs.logprobs_T - inputs.old_T).exp()

plain.decoupled = False
"""

ADVANTAGES = """
import numpy as np

def flat(rewards, lengths, config):
    return (rewards - rewards.mean()).ravel()

def nan_if_equal(rewards, lengths, config):
    with np.errstate(invalid="ignore"):
        return (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)

def random(rewards, lengths, config):
    return rewards * np.random.rand()

def by_place(rewards, lengths, config):
    return rewards * np.arange(len(rewards))[:, None]

def short(rewards, lengths, config):
    return [[np.zeros(n - 1) for n in row] for row in lengths]

def texts(rewards, lengths, config):
    return "advantages"

def with_gradient(rewards, lengths, config):
    import torch
    return torch.tensor(rewards, requires_grad=True)

def huge(rewards, lengths, config):
    return rewards * 1e300

def in_place(rewards, lengths, config):
    rewards -= rewards.mean(1, keepdims=True)
    lengths[:] = 1
    return rewards

def listed(rewards, lengths, config):
    return (rewards * lengths).tolist()

def tensor(rewards, lengths, config):
    import torch
    return torch.as_tensor(rewards * lengths)

def raises(rewards, lengths, config):
    return rewards / config.options["scale"]

def discounted(rewards, lengths, config):
    gamma = config.options["gamma"]
    return [
        [reward * gamma ** np.arange(n - 1, -1, -1) for reward, n in zip(row, tokens)]
        for row, tokens in zip(rewards, lengths)
    ]
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "our_objectives.py").write_text(OBJECTIVES)
    (tmp_path / "our_advantages.py").write_text(ADVANTAGES)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("our_objectives", "our_advantages"):
        sys.modules.pop(name, None)


def algorithm(**settings: object) -> AlgorithmConfig:
    return algorithm_config(prompts_per_step=5, samples_per_prompt=4, **settings)


def problems(name: str, **settings: object) -> dict[str, str]:
    return dict(contract.objective_checks(algorithm(loss=name, **settings)))


# ---- objectives


@pytest.mark.parametrize("objective", hooks.HOOKS[objectives.SETTING].built_in)
@pytest.mark.parametrize(
    "settings",
    [{}, {"behavior_weight_level": "sequence", "behavior_weight_action": "truncate"}],
    ids=["mask", "truncate samples"],
)
def test_built_in_objectives_keep_the_contract(objective: str, settings: dict[str, object]) -> None:
    checks = problems(objective, dual_clip=1.5, entropy_coef=0.1, **settings)
    assert set(checks.values()) == {""} and len(checks) == 9 - (objective == "cispo")
    assert contract.sign_note(algorithm(loss=objective)) == ""


def test_users_objective_keeps_the_contract() -> None:
    assert set(problems("our_objectives:good").values()) == {""}


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("nan_for_fresh_tokens", "finite", "the loss is nan for tokens of the current policy"),
        ("random", "repeatable", "use no random numbers"),
        ("detached", "gradient", "no gradient reaches inputs.logprobs_T"),
        ("half_detached", "finite differences", "`surrogate = True`"),
        ("uses_padding", "masked tokens", "use inputs.mask_T"),
        ("normalised_by_cut", "cuts", "divide by no number of tokens"),
        ("centered_over_samples", "other samples", "depends on the values of another sample"),
        ("by_position", "order", "packed in another order"),
        ("sum_of_own_shard", "context parallelism", "by inputs.sample_index only"),
    ],
)
def test_planted_fault_of_an_objective_is_named(fault: str, check: str, words: str) -> None:
    checks = problems(f"our_objectives:{fault}")
    assert words in checks[check]
    before = list(checks)[: list(checks).index(check)]
    assert [checks[name] for name in before] == [""] * len(before)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("summed", "returned the loss of shape (), not of shape (6,)"),
        ("number_metric", "returned the metric 'far' of type float, not of shape (6,)"),
        ("in_place", "changed inputs.advantages_T in place; make a new tensor"),
        ("float_metric", "returned clipped of type torch.float32, not torch.bool"),
        ("named_metric", "a metric named 'Far away'"),
        ("nothing", "returned NoneType, not a tensor"),
        ("raises", "failed: KeyError: 'width'"),
    ],
)
def test_objective_with_a_wrong_result_is_refused_at_the_start(fault: str, words: str) -> None:
    with pytest.raises(HookFailed, match=re.escape(words)) as failed:
        objectives.load(algorithm(loss=f"our_objectives:{fault}"))
    assert str(failed.value).startswith(f"algorithm.loss.objective = our_objectives:{fault} ")


def test_wrong_sign_keeps_the_contract_and_gets_a_remark() -> None:
    assert set(problems("our_objectives:wrong_sign").values()) == {""}
    assert "is the sign right?" in contract.sign_note(algorithm(loss="our_objectives:wrong_sign"))


def test_metrics_of_an_objective_are_summed_over_the_loss_tokens() -> None:
    c = algorithm(loss="our_objectives:good")
    assert sum_names(c) == (*SUMS, "user/far")
    inputs = contract._inputs(contract.samples(0.3))
    _, metrics = policy_loss(inputs, c)
    far_T = ((inputs.logprobs_T - inputs.proximal_T).exp() - 1).abs() > 0.1
    assert metrics["user/far"] == (far_T & inputs.mask_T).sum() > 0
    assert metrics["clipped"] == 0


def test_objective_that_is_not_decoupled_compares_with_the_behavior_policy() -> None:
    inputs = contract._inputs(contract.samples(0.3))
    loss, metrics = policy_loss(inputs, algorithm(loss="our_objectives:plain"))
    ratio_T = (inputs.logprobs_T - inputs.behavior_T).exp()
    torch.testing.assert_close(loss, -(inputs.advantages_T * ratio_T)[inputs.mask_T].sum())
    assert metrics["behavior_weight"] == metrics["tokens"]
    with pytest.raises(ConfigError, match=r"m2_threshold = 0\.04 needs proximal logprobs"):
        objectives.load(algorithm(loss="our_objectives:plain", m2_threshold=0.04))


# ---- advantages


@pytest.mark.parametrize("estimator", hooks.HOOKS["algorithm.advantage.estimator"].built_in)
@pytest.mark.parametrize("batch_normalize", [False, True])
def test_built_in_estimators_keep_the_contract(estimator: str, batch_normalize: bool) -> None:
    c = algorithm(advantage=estimator, batch_normalize=batch_normalize)
    assert set(dict(advantage_checks(c)).values()) == {""}


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("flat", "rewards", "an array of shape (20,) and type float64; return an array of shape"),
        ("nan_if_equal", "equal rewards", "returned nan, infinity or a number"),
        ("random", "repeatable", "use no random numbers"),
        ("by_place", "order of groups", "depend on its place in the batch"),
        ("short", "rewards", "other lengths than the samples have generated tokens"),
        ("texts", "rewards", "returned a str"),
        ("with_gradient", "rewards", "returned a Tensor; return an array of shape"),
        ("huge", "rewards", "beyond float32; return finite numbers"),
        ("raises", "rewards", "failed: KeyError: 'scale'"),
    ],
)
def test_planted_fault_of_an_estimator_is_named(fault: str, check: str, words: str) -> None:
    checks = dict(advantage_checks(algorithm(advantage=f"our_advantages:{fault}")))
    assert words in checks[check]
    assert [name for name, problem in checks.items() if problem] == [check]


def test_estimator_cannot_change_the_lengths() -> None:
    """They are the weights of batch_normalize."""
    lengths_GS = np.array([[1, 5], [7, 3]])
    rewards_GS = np.array([[0.0, 1.0], [1.0, 0.0]])
    want, got = (
        sample_advantages(rewards_GS, lengths_GS, algorithm(advantage=name, batch_normalize=True))
        for name in ("dr_grpo", "our_advantages:in_place")
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", ["listed", "tensor"])
def test_advantages_may_be_lists_of_numbers_or_a_tensor(form: str) -> None:
    rewards, tokens = np.random.default_rng(0).random((5, 4)), np.full((5, 4), 3)
    got = sample_advantages(rewards, tokens, algorithm(advantage=f"our_advantages:{form}"))
    assert np.array_equal(got, shaped_rewards(rewards, algorithm()) * 3)


def test_estimator_that_fails_is_refused_at_the_start() -> None:
    with pytest.raises(HookFailed, match="our_advantages:raises failed: KeyError: 'scale'"):
        check_estimator(algorithm(advantage="our_advantages:raises"))
    with pytest.raises(HookFailed, match="our_advantages:nan_if_equal returned nan"):
        check_estimator(algorithm(advantage="our_advantages:nan_if_equal"))
    no_equal = FilterConfig(drop_equal_rewards=True)
    check_estimator(algorithm(advantage="our_advantages:nan_if_equal", filters=no_equal))


def test_one_advantage_per_token_is_normalized_over_the_batch() -> None:
    tokens, options = np.array([[3, 1], [2, 4]]), {"gamma": 0.5}
    rewards = np.array([[1.0, 0.0], [1.0, 1.0]])  # shaped: 1, -1, 1, 1

    def estimated(batch_normalize: bool) -> list[list[np.ndarray]]:
        advantage = AdvantageConfig(
            estimator="our_advantages:discounted", options=options, batch_normalize=batch_normalize
        )
        c = AlgorithmConfig(prompts_per_step=2, samples_per_prompt=2, advantage=advantage)
        return sample_advantages(rewards, tokens, c)

    plain = estimated(False)
    np.testing.assert_allclose(plain[0][0], [0.25, 0.5, 1.0])
    np.testing.assert_allclose(plain[1][1], [0.125, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(token_means(plain)[0], [1.75 / 3, -1.0])
    normalized = np.concatenate([a_K for row in estimated(True) for a_K in row])
    assert normalized.mean() == pytest.approx(0) and normalized.std() == pytest.approx(1, abs=1e-4)
