from __future__ import annotations

from typing import Any

import pytest

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher.gpus import assign_gpus, visible_gpus


def settings(servers: int = 2, tp_size: int = 2, **sglang: Any) -> Config:
    return load.from_tree(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": "unused", "context_tokens": 40},
            "data": {"train": "unused"},
            "rollout": {"max_new_tokens": 30, "servers": servers},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
            "megatron": {"tensor_model_parallel_size": 2},
            "sglang": {"tp_size": tp_size, **sglang},
        }
    )


def test_trainer_and_servers_share_no_gpu() -> None:
    shares = assign_gpus(settings(), list("abcdefgh"))
    assert shares == {"trainer": "a,b", "rollout-0": "c,d", "rollout-1": "e,f"}


def test_too_few_gpus_error_gives_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"needs 6 GPUs.*this host has 5"):
        assign_gpus(settings(), list("abcde"))


def test_cpu_run_sees_no_gpu() -> None:
    assert set(assign_gpus(settings(device="cpu"), ["0", "1"]).values()) == {""}


def test_visible_devices_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
