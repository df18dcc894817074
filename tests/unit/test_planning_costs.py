"""Costs of decoding, training and updates: their units, directions and measured figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_builders import config_tree
from qwen3_shapes import model_config

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.planning import analytic, hardware
from megatron_async_rl.planning.costs import Costs, DecodeCosts, TrainCosts
from megatron_async_rl.planning.lengths import Lengths, log_normal

LONG = {"model.context_tokens": 33000, "trainer.max_tokens_per_microbatch": 33000}
STEP_TOKENS = 131072  # of the measured training steps


def config(folder: Path, **settings: Any) -> Config:
    standard = {"model.path": str(folder), "rollout.max_concurrent_samples": 256} | LONG
    return load.from_tree(config_tree(**(standard | settings)))


def costs(folder: Path, model: str, gpu: str = "h100", layers: int = 0, **settings: Any) -> Costs:
    hf = model_config(model, folder, **({"num_hidden_layers": layers} if layers else {}))
    return analytic.costs(config(folder, **settings), hf, hardware.gpu(gpu))


# ---- decoding


def test_decode_step_grows_with_batch_and_context(tmp_path: Path) -> None:
    decode = costs(tmp_path, "Qwen3-8B").decode
    assert decode.seconds(1, 1000) < decode.seconds(64, 1000) < decode.seconds(64, 200_000)
    rates = [decode.tokens_per_s(batch, 1000) for batch in (1, 16, 64, 256)]
    assert rates == sorted(rates)
    assert [decode.tokens_per_s(64, c) for c in (8000, 4000, 1000)] == sorted(
        decode.tokens_per_s(64, c) for c in (8000, 4000, 1000)
    )


def test_decode_step_is_at_least_the_time_to_read_the_weights(tmp_path: Path) -> None:
    decode = costs(tmp_path, "Qwen3-8B").decode
    weights_s = 2 * 7.57e9 / 3.35e12  # without the embedding; datasheet bandwidth
    assert weights_s < decode.seconds(1, 0) < 2 * weights_s


def test_decoding_of_256_samples_takes_the_measured_time(tmp_path: Path) -> None:
    """docs/results/2026-11-weights.md, `Cost in tokens`: 16,681 tokens/s, an H200."""
    decode = costs(tmp_path, "Qwen3-8B", "h200").decode
    assert decode.tokens_per_s(256, 64 + 977 / 2) == pytest.approx(16681, rel=0.1)


def test_more_bandwidth_and_tensor_parallelism_decode_faster(tmp_path: Path) -> None:
    load = 64, 64 * 4000
    one = costs(tmp_path, "Qwen3-8B").decode.seconds(*load)
    assert costs(tmp_path, "Qwen3-8B", "h200").decode.seconds(*load) < one
    split = costs(tmp_path, "Qwen3-8B", **{"sglang.tp_size": 2}).decode.seconds(*load)
    assert one / 2 < split < one


def test_few_samples_read_few_experts(tmp_path: Path) -> None:
    few, many = (
        costs(tmp_path, "Qwen3-30B-A3B", **{"rollout.max_concurrent_samples": count}).decode
        for count in (2, 256)
    )
    assert few.step_s < many.step_s / 2


def test_prefill_of_8b_takes_the_measured_time(tmp_path: Path) -> None:
    """docs/results/2026-11-weights.md: 240,000 tokens of context at 40,000 a second."""
    prefill = costs(tmp_path, "Qwen3-8B", "h200").prefill
    assert 240_000 / (256 * prefill.seconds(240_000 / 256)) == pytest.approx(40_000, rel=0.1)


def test_kv_cache_holds_what_the_weights_leave(tmp_path: Path) -> None:
    settings = {"sglang.mem_fraction_static": 0.8}
    found = costs(tmp_path, "Qwen3-8B", **settings).kv_tokens
    assert found == pytest.approx((0.8 * 80e9 - 16.38e9) / 147_456, rel=0.01)
    limited = costs(tmp_path, "Qwen3-8B", **{"sglang.max_total_tokens": 40_000})
    assert limited.kv_tokens == 40_000


# ---- training


@pytest.mark.parametrize(
    ("model", "layers", "mean", "longest", "settings", "tokens_per_s"),
    [
        ("Qwen3-8B", 12, 2048, 8192, {}, 29308),
        ("Qwen3-8B", 12, 8192, 32768, {}, 24392),
        ("Qwen3-1.7B", 28, 2048, 8192, {}, 39339),
        ("Qwen3-1.7B", 28, 8192, 32768, {}, 29359),
        ("Qwen3-8B", 36, 8192, 32768, {"megatron.tensor_model_parallel_size": 2}, 2 * 7932),
    ],
)
def test_training_takes_the_measured_time(
    model: str, layers: int, mean: int, longest: int, settings: dict[str, Any],
    tokens_per_s: float, tmp_path: Path,
) -> None:  # fmt: skip
    """docs/results/2026-11-trainer.md, H200, without the proximal pass."""
    train = costs(tmp_path, model, "h200", layers, **settings).train
    drawn = log_normal(mean * 0.92, longest, 1).response_tokens[: 100 * STEP_TOKENS // mean]
    _, train_s = train.seconds(drawn.tolist())
    assert drawn.sum() / train_s == pytest.approx(tokens_per_s, rel=0.15)


def test_replicas_share_the_tokens_and_the_proximal_pass_is_a_third() -> None:
    one = TrainCosts(token_s=0.01, forward_passes=1, minibatches=2, minibatch_s=0.5)
    assert one.seconds([100, 100]) == pytest.approx((2 / 3, 2.0 + 2 * 0.5))
    assert replace(one, replicas=2).seconds([100, 100]) == pytest.approx((1 / 3, 1.0 + 1.0))


def test_small_microbatches_take_the_time_of_their_launches() -> None:
    train = TrainCosts(token_s=1e-6, microbatch_s=0.2, microbatch_tokens=100, minibatches=2)
    assert train.seconds([50] * 12)[1] == pytest.approx(2 * 3 * 0.2)


def test_pipeline_waits_for_its_first_and_last_microbatch() -> None:
    train = TrainCosts(token_s=0.01, microbatch_tokens=100, pipeline_stages=3)
    assert train.seconds([100] * 4)[1] == pytest.approx(4 * (1 + 2 / 4))


def test_update_grows_with_the_model(tmp_path: Path) -> None:
    small, large = (costs(tmp_path, f"Qwen3-{size}").update_s for size in ("1.7B", "8B"))
    assert 0.05 < small < large < 0.2


# ---- lengths


def test_log_normal_has_the_mean_and_the_limit() -> None:
    lengths = log_normal(1000, 4096, 50)
    assert lengths.mean_response == pytest.approx(1000, rel=0.01)
    assert lengths.response_tokens.max() == 4096 and lengths.mean_tokens > 1049


def test_running_samples_are_longer_than_half_the_mean() -> None:
    """A sample of 300 tokens runs thrice as long as one of 100: (300^2 + 100^2) / (2 * 400)."""
    lengths = Lengths(np.array([10, 10]), np.array([100, 300]))
    assert lengths.mean_context == pytest.approx(10 + 125)


def test_rate_is_samples_over_seconds() -> None:
    assert DecodeCosts(0.01, 0.001, 0.0).tokens_per_s(10, 0) == pytest.approx(10 / 0.02)
