"""Settings that another setting excludes: each is one line, and no other setting is."""

from __future__ import annotations

from typing import Any

import pytest
from config_builders import config_tree

from megatron_async_rl.config import load
from megatron_async_rl.config.warnings import warnings

CPU = {"sglang.device": "cpu"}


def texts(**settings: Any) -> list[str]:
    return warnings(load.from_tree(config_tree(**settings)))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"algorithm.advantage.gamma": 0.9}, ["algorithm.advantage.gamma = 0.9"]),
        ({"algorithm.advantage.gamma": 0.9, "algorithm.advantage.estimator": "gae"}, []),
        ({"critic.lr": 1e-5, "critic.path": "c"}, ["critic.path = c", "critic.lr = 0.00001"]),
        (
            {"algorithm.loss.dual_clip": 3.0, "algorithm.loss.objective": "cispo"},
            ["algorithm.loss.dual_clip = 3.0"],
        ),
        ({"algorithm.loss.dual_clip": 3.0, "algorithm.loss.objective": "gspo"}, []),
        ({"algorithm.loss.clip_eps_high": 0.3, "algorithm.loss.objective": "cispo"}, []),
        (
            {
                "algorithm.loss.objective": "ppo",
                "algorithm.staleness_correction.behavior_weight_cap": 2.0,
            },
            ["algorithm.staleness_correction.behavior_weight_cap = 2.0"],
        ),
        (
            {
                "algorithm.staleness_correction.behavior_weight_cap": None,
                "algorithm.staleness_correction.behavior_weight_action": "truncate",
            },
            ["algorithm.staleness_correction.behavior_weight_action = truncate"],
        ),
        ({"algorithm.kl.estimator": "k2"}, ["algorithm.kl.estimator = k2"]),
        ({"monitor.prometheus_host": "0.0.0.0"}, ["monitor.prometheus_host = 0.0.0.0"]),
        ({"monitor.prometheus_host": "0.0.0.0", "monitor.prometheus_port": 9100}, []),
        ({"algorithm.kl.estimator": "k2", "algorithm.kl.coef": 0.1}, []),
        (
            {
                "algorithm.kl.estimator": "k2",
                "algorithm.kl.coef": 0.1,
                "algorithm.kl.apply_to": "reward",
            },
            ["algorithm.kl.estimator = k2"],
        ),
        ({"algorithm.reward_shaping.overlong_penalty": 2.0}, ["overlong_penalty = 2.0"]),
        (
            {"staleness.straggler_timeout_s": 5.0, "staleness.straggler_policy": "drop"},
            ["staleness.straggler_timeout_s = 5.0"],
        ),
        ({"sandbox.memory_mb": 100}, ["sandbox.memory_mb = 100"]),
        ({"sandbox.memory_mb": 100, "reward.function": "code"}, []),
        ({"data.add_bos": True, "data.chat_template": True}, ["data.add_bos = true"]),
        ({"weights.snapshot_every": 2, "weights.transport": "disk"}, ["snapshot_every = 2"]),
        ({"weights.snapshot_every": 2}, []),
        ({"checkpoint.every": 0, "checkpoint.keep": 3}, ["checkpoint.keep = 3"]),
        ({"checkpoint.every": 11}, ["checkpoint.every = 11"]),
        ({"run.steps": 5}, []),  # checkpoint.every = 10 is the default
        ({"evaluation.every": 2}, ["evaluation.every = 2"]),
        ({"faults.max_restarts": 0, "faults.restart_backoff_s": 3.0}, ["restart_backoff_s = 3.0"]),
        ({"megatron.min_lr": 1e-7}, ["megatron.min_lr = 1e-7"]),
        ({"megatron.min_lr": 1e-7, "megatron.lr_decay_style": "cosine"}, []),
        ({"megatron.sequence_parallel": True}, ["megatron.sequence_parallel = true"]),
        (
            {"run.mode": "rollout_only", "trainer.precision": "fp32", "checkpoint.every": 3},
            ["run.mode = rollout_only trains nothing: trainer.precision, checkpoint.every"],
        ),
        ({"sglang.max_running_requests": 64}, ["sglang.max_running_requests = 64 is less than"]),
        ({"sglang.cuda_graph_max_bs": 64}, ["sglang.cuda_graph_max_bs = 64 is less than"]),
        ({"sglang.cuda_graph_max_bs": 64, **CPU}, []),
        ({"sglang.cuda_graph_bs_decode": [1, 64]}, ["cuda_graph_bs_decode = 64 is less than"]),
        ({"sglang.cuda_graph_bs_decode": [1, 256]}, []),
        ({"sglang.cuda_graph_max_bs": 256}, []),
        ({"reward.timeout_s": 700.0}, ["reward.timeout_s = 700 is longer than rollout.lease"]),
        ({"sandbox.test_timeout_s": 20.0, "reward.function": "code"}, ["test_timeout_s = 20 is"]),
        ({}, []),
    ],
)
def test_setting_without_effect_is_one_line(settings: dict[str, Any], found: list[str]) -> None:
    lines = texts(**settings)
    assert len(lines) == len(found)
    assert [part for part, line in zip(found, lines, strict=True) if part not in line] == []


def test_function_of_the_user_may_read_every_setting() -> None:
    assert (
        texts(
            **{
                "algorithm.advantage.estimator": "mine:advantages",
                "algorithm.advantage.gamma": 0.9,
                "algorithm.advantage.group_normalize": False,
                "algorithm.loss.objective": "mine:loss",
                "algorithm.loss.dual_clip": 3.0,
            }
        )
        == []
    )
