"""The settings that the real SGLang and Megatron-Core of this host have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_model
from config_builders import config_tree
from needs import needs_engine

from megatron_async_rl import installed
from megatron_async_rl.config import load, passed_on
from megatron_async_rl.config.passed_on import KnownSettings
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher.checks.settings import check_megatron_together

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KnownSettings]:
    python = engine_python()
    assert python is not None
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MEGATRON_ASYNC_RL_CACHE", raising=False)
        found = {
            "sglang": installed.engine_settings(python, said.append),
            "megatron": installed.trainer_settings(said.append),
        }
        assert len(said) == 2
        assert found["sglang"] == installed.engine_settings(python, said.append)
        assert found["megatron"] == installed.trainer_settings(said.append)
        assert len(said) == 2  # the second time from the cache
    return found


@needs_engine
@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("sglang.mem_fraction", 0.3, "did you mean sglang.mem_fraction_static?"),
        ("sglang.tensor_parallel_size", 2, "set sglang.tp_size instead"),
        ("sglang.gpu_memory_utilization", 0.5, "did you mean sglang.mem_fraction_static?"),
        ("sglang.disable_cuda_graph", "yes", "expects bool"),
        ("sglang.dtype", "fp8", "use one of auto, half, float16, bfloat16"),
        ("sglang.max_running_requests", 2.5, "expects int"),
        ("megatron.learning_rate", 1e-6, "did you mean megatron.lr?"),
        ("megatron.clip_gard", 1.0, "did you mean megatron.clip_grad?"),
        ("megatron.lr", "fast", "expects float"),
        ("megatron.sequence_parallel", "maybe", "expects bool"),
        ("megatron.recompute_granularity", "most", "use one of full, selective"),
        ("megatron.lr", -1e-6, "expected at least 0"),
        ("megatron.adam_beta2", "1.0", "expected at least 0 and less than 1"),
        ("megatron.lr_decay_style", "cosin", "use one of constant, linear, cosine"),
        ("megatron.LR", 1e-6, "did you mean megatron.lr?"),
        ("sglang.mem_fraction_static", 1.5, "expected at least 0.01 and less than 1"),
        ("sglang.device", "gpu", "use one of cuda, cpu"),
        ("sglang.help", True, "is not a setting"),
    ],
)
def test_wrong_setting_is_refused(
    known: dict[str, KnownSettings], setting: str, value: Any, words: str
) -> None:
    section, key = setting.split(".")
    with pytest.raises(ConfigError) as refused:
        passed_on.check(section, {key: value}, known[section])
    assert str(refused.value).startswith(f"{setting} = {value!r}")
    assert words in str(refused.value)


@needs_engine
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_have_only_known_settings(
    known: dict[str, KnownSettings], path: Path
) -> None:
    config = load.load(path)
    passed_on.check("sglang", config.sglang, known["sglang"])
    passed_on.check("megatron", config.megatron, known["megatron"])


@needs_engine
def test_other_forms_of_a_value_are_accepted(known: dict[str, KnownSettings]) -> None:
    passed_on.check("megatron", {"lr": "1e-6", "adam_beta2": 0}, known["megatron"])
    engine = {"cuda_graph_bs_decode": [1, 2], "mem_fraction_static": None, "port": 30000}
    passed_on.check("sglang", engine, known["sglang"])


def test_settings_that_megatron_refuses_together_are_found(tmp_path: Path) -> None:
    path = tiny_model.make_model(tmp_path / "model")
    tree = {"model.path": str(path), "megatron.recompute_granularity": "full"}
    with pytest.raises(ConfigError, match=r"megatron\.core refuses .*recompute_method"):
        check_megatron_together(load.from_tree(config_tree(**tree)), print)
    tree |= {"megatron.recompute_method": "uniform", "megatron.recompute_num_layers": 1}
    found = check_megatron_together(load.from_tree(config_tree(**tree)), print)
    assert found == "Megatron-Core accepts them together"
