"""`plan`: splits of N GPUs, their predictions, errors, and costs from a run's records."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from config_builders import config_tree
from qwen3_shapes import model_config

from megatron_async_rl.__main__ import main
from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.observability.sample_log import SampleLine, encode_line
from megatron_async_rl.observability.tensorboard import TensorBoard
from megatron_async_rl.planning import analytic, calibration, hardware, predict, search
from megatron_async_rl.planning.lengths import log_normal

H100 = hardware.gpu("h100")
SERVERS, CONCURRENT = 2, 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_config("Qwen3-1.7B", tmp_path)
    return tmp_path


def tree(folder: Path, **settings: Any) -> dict[str, Any]:
    standard = {
        "model.path": str(folder),
        "rollout.servers": SERVERS,
        "rollout.max_concurrent_samples": CONCURRENT,
        "trainer.max_tokens_per_microbatch": 8192,
        "algorithm.prompts_per_step": 8,
        "staleness.max_staleness": 1,
    }
    return config_tree(**(standard | settings))


def config(folder: Path, **settings: Any) -> Config:
    return load.from_tree(tree(folder, **settings))


def plan(folder: Path, *arguments: str, **settings: Any) -> int:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree(folder, **settings)))
    return main(["plan", str(path), *arguments])


# ---- splits and their predictions


def test_splits_use_all_gpus_in_sizes_that_divide_the_batch(folder: Path) -> None:
    one = config(folder, **{"megatron.tensor_model_parallel_size": 2})
    found = search.splits(one, analytic.HfConfig(folder), 12, None)
    sizes = [(c.trainer.data_parallel_size, c.trainer_ranks, c.rollout.servers) for c in found]
    assert sizes == [(1, 2, 10), (2, 4, 8), (4, 8, 4)]  # 3 and 5 do not divide 16 samples


def test_plan_prints_the_best_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--gpus", "4", "--mean-tokens", "20") == 0
    text = capsys.readouterr().out
    assert "mean 20, at most 64 tokens" in text and "best: trainer.data_parallel_size=" in text
    rows = [line.split() for line in text.splitlines() if "(dp " in line]
    assert {row[0] for row in rows} == {"1", "2"}  # three replicas do not divide the batch


def test_best_split_is_near_the_better_bound(folder: Path) -> None:
    one, load_of = config(folder), predict.Load(log_normal(20, 64, 64))
    hf = analytic.HfConfig(folder)
    found = search.splits(one, hf, 4, H100)
    best, *others = search.search(
        found, lambda c: analytic.costs(c, hf, H100), load_of, lambda text: None
    )
    rate = best.prediction.trained_tokens_per_s
    assert rate >= max(c.prediction.trained_tokens_per_s for c in others) / search.GAIN
    for candidate in (best, *others):
        bound = min(candidate.generation_bound, candidate.training_bound)
        assert candidate.prediction.trained_tokens_per_s <= 1.1 * bound


def test_part_of_a_fleet_predicts_the_whole(folder: Path) -> None:
    settings = {"rollout.servers": 16, "algorithm.prompts_per_step": 64}
    one, load_of = config(folder, **settings), predict.Load(log_normal(20, 64, 64))
    costs = analytic.costs(one, analytic.HfConfig(folder), H100)
    whole = predict.predict(one, costs, load_of, max_samples=100_000)
    part = predict.predict(one, costs, load_of, max_samples=400)
    assert whole.part == 1 and part.part < 0.5
    assert part.trained_tokens_per_s == pytest.approx(whole.trained_tokens_per_s, rel=0.15)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "settings", "texts"),
    [
        (
            ["--gpus", "4"],
            {"megatron.tensor_model_parallel_size": 4, "sglang.tp_size": 2},
            ["--gpus = 4", "less than 6", "tensor_model_parallel_size 4", "at least --gpus 6"],
        ),
        (["--gpu", "b200"], {}, ["--gpu = b200", "h100, h200, h800", "--calibrate"]),
        (["--mean-tokens", "65"], {}, ["--mean-tokens = 65", "rollout.max_new_tokens = 64"]),
        (["--prompt-tokens", "65"], {}, ["--prompt-tokens = 65", "model.context_tokens = 128"]),
        ([], {"sglang.device": "cpu"}, ["sglang.device = cpu", "--calibrate RUN_DIR"]),
        ([], {"run.mode": "rollout_only"}, ["run.mode = rollout_only", "set run.mode=train"]),
        (["--calibrate", "/nowhere"], {}, ["--calibrate = /nowhere", "give the run.dir"]),
    ],
)
def test_error_names_setting_rule_and_remedy(
    arguments: list[str], settings: dict[str, Any], texts: list[str], folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert plan(folder, *arguments, **settings) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert [text for text in texts if text not in error] == []


def test_trainer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    hf = model_config("Qwen3-32B", tmp_path)
    with pytest.raises(ConfigError, match=r"needs \d+ GiB.*raise megatron.tensor_model_parallel"):
        search.splits(config(tmp_path), hf, 4, H100)


def test_server_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    hf = model_config("Qwen3-32B", tmp_path)
    one = config(tmp_path, **{"sglang.mem_fraction_static": 0.5})
    with pytest.raises(ConfigError, match=r"sglang.tp_size = 1 leaves 61 GiB.*37 GiB"):
        analytic.costs(one, hf, H100)


# ---- calibration


def write_run(
    folder: Path, steps: int = 8, unreported: Collection[int] = (), **scalars: float
) -> Path:
    """Writes the records of a run with a decode step of 10 ms + 1 ms for each sample."""
    run_dir = folder / "run"
    run_dir.mkdir()
    settings = {"run.dir": str(run_dir), "run.steps": steps}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree(folder, **settings)))
    board = TensorBoard(run_dir / "tensorboard")
    for version in range(1, steps + 1):
        running = 4.0 + version  # of each server
        rate = running / (0.010 + 0.001 * running)
        values = {
            "perf/time/step_s": 2.0,
            "perf/time/wait_for_batch_s": 1.0,
            "perf/time/proximal_s": 0.1,
            "perf/time/train_s": 0.3,
            "train/tokens": 320.0,
            "train/packed_tokens": 400.0,
            "sync/total_s": 0.4,
            "engine/running_requests": SERVERS * running,
            "engine/decode_tokens_per_s": SERVERS * rate,
            "engine/kv_use_fraction": 0.5,
            "perf/engine_idle_fraction": 0.25,
            "perf/generate_tokens_per_s": 100.0,
        }
        written = values | scalars
        if version in unreported:
            written = {tag: v for tag, v in written.items() if not tag.startswith("engine/")}
        board.scalars(version, written)
    with (run_dir / "samples.jsonl").open("wb") as file:
        for number in range(16 * steps):
            file.write(encode_line(sample_line(number)))
    return run_dir


def sample_line(number: int) -> SampleLine:
    return SampleLine(
        version=number // 16, group_id=number // 2, prompt_id="p", index=number % 2, reward=1.0,
        advantage=0.0, num_prompt=5, num_generated=20, versions=[[0, 15], [1, 5]], stop="stop",
        num_interrupts=1, text="", ids_bytes=b"", logprobs_bytes=b"",
    )  # fmt: skip


def test_costs_are_those_of_the_records(folder: Path) -> None:
    measured = calibration.read(write_run(folder))
    costs = measured.costs
    assert costs.decode.step_s == pytest.approx(0.010, rel=1e-3)
    assert costs.decode.sample_s == pytest.approx(0.001, rel=1e-3)
    assert costs.train.seconds([25] * 16) == pytest.approx((0.1, 0.3))  # 400 tokens
    assert costs.update_s == pytest.approx(0.4)
    assert costs.between_steps_s == pytest.approx(2.0 - 1.0 - 0.1 - 0.3 - 0.4)
    assert np.all(measured.load.lengths.response_tokens == 20)
    assert measured.trained_tokens_per_s == pytest.approx(160.0)
    double = measured.costs_of(config(folder, **{"trainer.data_parallel_size": 2}))
    assert double.train.seconds([25] * 16) == pytest.approx((0.05, 0.15))


def test_steps_without_a_report_of_the_servers_are_left_out(folder: Path) -> None:
    decode = calibration.read(write_run(folder, unreported=(4, 7))).costs.decode
    assert decode.step_s == pytest.approx(0.010, rel=1e-3)
    assert decode.sample_s == pytest.approx(0.001, rel=1e-3)


def test_without_a_rate_of_decoding_the_busy_time_counts(folder: Path) -> None:
    """100 tokens/s in three quarters of the time, whatever the number of samples: a CPU."""
    measured = calibration.read(write_run(folder, **{"engine/decode_tokens_per_s": 0.0}))
    for running in (5, 10):
        rate = SERVERS * measured.costs.decode.tokens_per_s(running, 0)
        assert rate == pytest.approx(100 / 0.75)


@pytest.mark.filterwarnings("error")
def test_steps_without_a_generated_token_have_no_rate(folder: Path) -> None:
    idle = {"perf/generate_tokens_per_s": 0.0, "perf/engine_idle_fraction": 1.0}
    rates = {"engine/decode_tokens_per_s": 0.0, "engine/running_requests": 0.0}
    with pytest.raises(DataError, match="reported no running samples"):
        calibration.read(write_run(folder, **idle, **rates))


def test_filtered_groups_count_as_dropped(folder: Path) -> None:
    run_dir = write_run(folder, **{"drops/filtered_groups": 8.0})
    assert calibration.read(run_dir).load.dropped_fraction == pytest.approx(0.5)


def test_calibrated_plan_states_its_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder, "--calibrate", str(write_run(folder)), "--gpus", "4") == 0
    text = capsys.readouterr().out
    assert "its step takes" in text and "measured 2.00 s" in text and "best: " in text


def test_part_of_a_long_run_is_simulated(folder: Path) -> None:
    measured = calibration.read(write_run(folder))
    run = msgspec.structs.replace(measured.config.run, steps=1_000_000)
    long = replace(measured, config=msgspec.structs.replace(measured.config, run=run))
    step_s = measured.predict_itself().step_s
    assert long.predict_itself().step_s == pytest.approx(step_s, rel=0.1)


def test_run_of_another_layout_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(folder)
    settings = {"megatron.tensor_model_parallel_size": 2}
    assert plan(folder, "--calibrate", str(run_dir), **settings) == 2
    assert "tensor_model_parallel_size = 2 differs from 1" in capsys.readouterr().err


def test_run_without_records_is_refused(folder: Path) -> None:
    run_dir = write_run(folder, steps=4)
    with pytest.raises(DataError, match="2 steps after the first 2, and 3 are needed"):
        calibration.read(run_dir)
    (run_dir / "samples.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"samples\.jsonl has no samples"):
        calibration.read(run_dir)
    (run_dir / "samples.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no samples\.jsonl"):
        calibration.read(run_dir)
