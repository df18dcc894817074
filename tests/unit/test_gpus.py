"""Which GPUs each process of a run sees."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher.gpus import assign_gpus, visible_gpus
from megatron_async_rl.launcher.roles import names


def gpu_config(servers: int = 2, tp_size: int = 2, **sglang: Any) -> Config:
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
    shares = assign_gpus(gpu_config(), list("abcdefgh"), names(gpu_config()))
    assert shares == {"trainer": "a,b", "rollout-0": "c,d", "rollout-1": "e,f"}


def test_too_few_gpus_error_gives_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"needs 6 GPUs on this host, which has 5"):
        assign_gpus(gpu_config(), list("abcde"), names(gpu_config()))


def test_cpu_run_sees_no_gpu() -> None:
    assert set(assign_gpus(gpu_config(device="cpu"), ["0", "1"], names(gpu_config())).values()) == {
        ""
    }


def test_visible_devices_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_host_gives_gpus_only_to_its_own_processes() -> None:
    config = gpu_config(servers=3)
    gpus = [str(n) for n in range(8)]
    assert assign_gpus(config, gpus, names(config))["rollout-2"] == "6,7"
    assert assign_gpus(config, gpus, ["rollout-2", "reward-0"]) == {"rollout-2": "0,1"}
    assert assign_gpus(config, gpus, ["trainer"]) == {"trainer": "0,1"}
    with pytest.raises(
        ConfigError, match="this run needs 4 GPUs on this host, which has 3: 0 for trainer ranks"
    ):
        assign_gpus(config, gpus[:3], ["rollout-0", "rollout-5"])
