"""The whole system once, with nothing stood in for: controller, rollout worker and its SGLang server, reward worker, two
trainer ranks (TP=2). A short run of a random model whose requests are in flight at every weight update.

The run exports the policy of every version. So what the engine said of each token can be held against a fresh prefill
by transformers under the very weights that the token is labelled with, and against the neighbouring versions' weights.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from paths import ROOT, SUPPORT
from tiny import CPU_ENGINE, make_dataset, make_model

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.engine_env import engine_python
from megatron_async_rl.observability.run_log import Status, read_status
from megatron_async_rl.observability.sample_log import SampleLine, read_samples

STEPS, ETA = 6, 3
pytestmark = pytest.mark.skipif(
    engine_python() is None, reason="no engine environment: bash tools/setup_env.sh"
)


@dataclass
class Inputs:
    model: Path
    train: Path
    eval: Path

    def config(self, run_dir: Path, **sections: dict[str, Any]) -> Path:
        """A YAML for a run into `run_dir`; `sections` change its standard settings."""
        standard: dict[str, dict[str, Any]] = {
            "run": {"dir": str(run_dir), "steps": STEPS, "seed": 3, "export_every": 1},
            "model": {"path": str(self.model), "context_tokens": 128},
            "data": {"train": str(self.train), "eval": str(self.eval)},
            # one group at a time: generation is what takes long, so that updates meet it in flight on any machine
            "rollout": {"max_new_tokens": 96, "max_concurrent_samples": 4},
            "staleness": {"max_staleness": ETA},
            "reward": {"function": "loop_reward:even_digits"},
            "algorithm": {"prompts_per_step": 4, "samples_per_prompt": 4, "minibatches": 2},
            "trainer": {"precision": "fp32"},
            "weights": {"bucket_bytes": 65536, "verify_every": 1},
            "megatron": {"tensor_model_parallel_size": 2, "lr": 0.01},
            "sglang": CPU_ENGINE,
        }
        tree = {
            name: standard.get(name, {}) | sections.get(name, {}) for name in standard | sections
        }
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree))
        return path


def make_inputs(folder: Path) -> Inputs:
    return Inputs(
        make_model(folder / "model"),
        make_dataset(folder / "train.jsonl", 60),
        make_dataset(folder / "eval.jsonl", 6, 100),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def start(path: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_async_rl", "run", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=processes.die_with_parent,  # with pytest, also when that is killed
    )


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Whoever has the run's folder on its command line, and their descendants."""
    mine = [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(str(run_dir) in a for a in p.info["cmdline"] or [])
    ]
    return [p for p in mine if p.pid != os.getpid()]


def assert_nobody_left(run_dir: Path) -> None:
    deadline = time.monotonic() + 10
    while (left := processes_of(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@dataclass
class FinishedRun:
    folder: Path
    output: str

    @cached_property
    def samples(self) -> list[SampleLine]:
        return list(read_samples(self.folder))

    @cached_property
    def status(self) -> Status:
        return read_status(self.folder)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def run(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("loop") / "run"
    child = start(inputs.config(folder))
    output, errors = child.communicate(timeout=500)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    yield FinishedRun(folder, output)


def test_the_run_ends_well_says_how_it_went_and_leaves_nobody(run: FinishedRun) -> None:
    assert run.status.state == "finished"
    assert run.status.version == STEPS
    assert [evaluation.version for evaluation in run.status.evals] == [0, STEPS]
    assert "before" in run.output and "after" in run.output
    assert_nobody_left(run.folder)


def test_every_group_is_accounted_for(run: FinishedRun) -> None:
    ledger = run.status.ledger
    dropped = sum(count for name, count in ledger.items() if name.startswith("dropped."))
    assert ledger["admitted"] == ledger["trained"] + dropped + ledger["pending"]
    assert ledger["trained"] == STEPS * 4 and ledger["pending"] == 0
    trained = [(line.group_id, line.index) for line in run.samples]
    assert len(trained) == len(set(trained)) == STEPS * 16


def test_no_token_is_trained_later_than_eta_allows(run: FinishedRun) -> None:
    lags = [line.version - version for line in run.samples for version, _ in line.versions]
    assert max(lags) <= ETA
    assert max(lags) >= 1  # it was asynchronous


def test_updates_meet_requests_in_flight_and_samples_span_versions(run: FinishedRun) -> None:
    served = [line for line in run.log("controller").splitlines() if " is served by " in line]
    in_flight = [line for line in served if " 0 requests interrupted" not in line]
    assert len(served) == STEPS + 1
    assert len(in_flight) >= 3
    assert any(len(line.versions) >= 2 for line in run.samples)


def test_every_update_was_verified_by_digests(run: FinishedRun) -> None:
    assert "digests to" not in run.log("rollout-0")
    served = [
        line for line in run.log("controller").splitlines() if " is served by rollout-0" in line
    ]
    assert all("trainer_digest " in line for line in served) and len(served) == STEPS + 1


@lru_cache
def policy(run_dir: Path, version: int) -> Any:
    from transformers import AutoModelForCausalLM

    settings = load.load(run_dir / "config.yaml")
    folder = Path(settings.model.path) if version == 0 else run_dir / f"policy-v{version}"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def fresh_logprobs(run_dir: Path, version: int, line: SampleLine) -> np.ndarray:
    """[num_generated]: logprob of each generated token of all turns, by one prefill under the weights of `version`."""
    import torch

    ids = torch.tensor(line.ids, dtype=torch.long)
    with torch.no_grad():
        logits = policy(run_dir, version)(input_ids=ids[None]).logits[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
    return np.concatenate([logprobs[start - 1 : end - 1] for start, end in line.turns])


def difference_from_fresh_prefills(run: FinishedRun, line: SampleLine, num_spans: int) -> float:
    """Asserts that the first spans of the sample are as a fresh prefill under the weights of their labels has them.

    Returns the largest difference from prefills under neighbouring versions.
    """
    done, wrong_version = 0, 0.0
    for version, count in line.versions[:num_spans]:
        these = slice(done, done + count)
        said = np.asarray(line.logprobs[these])
        np.testing.assert_allclose(
            said, fresh_logprobs(run.folder, version, line)[these], atol=1e-3
        )
        other = fresh_logprobs(run.folder, version + 1 if version < STEPS else version - 1, line)
        wrong_version = max(wrong_version, float(np.abs(said - other[these]).max()))
        done += count
    return wrong_version


def test_an_interrupted_sample_s_logprobs_are_those_of_a_fresh_prefill(run: FinishedRun) -> None:
    spanning = [line for line in run.samples if len(line.versions) >= 2][:12]
    wrong_version = max(
        difference_from_fresh_prefills(run, line, len(line.versions)) for line in spanning
    )
    assert (
        wrong_version > 0.01
    )  # the weights differ enough that a stale cache or a wrong label would have shown


@pytest.mark.parametrize(
    "weights", [{"interrupt": "retract"}, {"kv_cache": "keep"}], ids=["retract", "keep"]
)
def test_requests_may_stay_in_the_engine_during_updates(
    weights: dict[str, str], inputs: Inputs, tmp_path: Path
) -> None:
    """keep: the first span alone is as a fresh prefill; what comes of the others test_interruption.py says."""
    child = start(inputs.config(tmp_path / "run", data={"eval": None}, weights=weights))
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(tmp_path / "run", output)
    assert run.status.ledger["trained"] == STEPS * 4 and run.status.ledger["pending"] == 0
    spanning = [line for line in run.samples if len(line.versions) >= 2]
    spans = 1 if "kv_cache" in weights else None
    wrong_version = max(
        difference_from_fresh_prefills(run, line, spans or len(line.versions)) for line in spanning
    )
    assert wrong_version > 0.01
    assert_nobody_left(run.folder)


def test_the_engine_and_transformers_agree_on_the_exported_policy(run: FinishedRun) -> None:
    whole = [line for line in run.samples if len(line.versions) == 1 and line.versions[0][0] > 0][
        :8
    ]
    assert whole
    for line in whole:
        np.testing.assert_allclose(
            line.logprobs, fresh_logprobs(run.folder, line.versions[0][0], line), atol=1e-3
        )


def test_the_trained_policy_is_a_folder_that_transformers_loads(run: FinishedRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    last = policy(run.folder, STEPS).state_dict()
    final = AutoModelForCausalLM.from_pretrained(
        run.folder / "policy", dtype="float32"
    ).state_dict()
    assert final.keys() == last.keys() and all(
        torch.equal(final[name], last[name]) for name in final
    )
    assert AutoTokenizer.from_pretrained(run.folder / "policy").encode("1+2=")
    assert not all(
        torch.equal(final[name], policy(run.folder, 0).state_dict()[name]) for name in final
    )


def test_tensorboard_has_the_run(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"reward/mean", "train/loss", "staleness/max", "sync/total_s", "eval/accuracy"} <= set(
        tags["scalars"]
    )
    assert {"staleness/per_token", "rollout/response_tokens", "rollout/versions_per_sample"} <= set(
        tags["histograms"]
    )
    assert len(events.Scalars("train/loss")) == STEPS


def test_megatron_and_the_engine_agree_on_the_same_weights(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    first = {
        tag: events.Scalars(f"train/{tag}")[0].value
        for tag in ("current_version_fraction", "logprob_diff_max")
    }
    assert first["current_version_fraction"] == 1.0  # the first batch is all of version 0
    assert first["logprob_diff_max"] < 1e-3


def test_keys_are_nobody_else_s_and_on_no_command_line(run: FinishedRun) -> None:
    for path in (run.folder / "keys").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    keys = yaml.safe_load((run.folder / "keys" / "rollout-0.sglang.yaml").read_text())
    for log in (run.folder / "logs").iterdir():
        assert not any(key in log.read_text() for key in keys.values()), log


def test_ctrl_c_stops_everything_and_loses_nothing_written(inputs: Inputs, tmp_path: Path) -> None:
    """Also: synchronous (eta = 0), and two pipeline stages that each send their own weights."""
    path = inputs.config(
        tmp_path / "run",
        run={"steps": 500, "export_every": 0},
        staleness={"max_staleness": 0},
        megatron={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
    )
    child = start(path)
    deadline = time.monotonic() + 240
    status_file = tmp_path / "run" / "status.json"
    while not (status_file.exists() and json.loads(status_file.read_text())["version"] >= 1):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.2)
    in_use = start(path)
    assert in_use.wait(60) == 2 and "is in use by another run" in in_use.communicate()[1]
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert_nobody_left(tmp_path / "run")
    samples = list(read_samples(tmp_path / "run"))
    assert len(samples) >= 16
    assert {line.version - version for line in samples for version, _ in line.versions} == {0}


def test_an_engine_that_dies_at_start_is_one_clear_message(inputs: Inputs, tmp_path: Path) -> None:
    child = start(inputs.config(tmp_path / "run", sglang={"attention_backend": "no_such_backend"}))
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert (
        errors.startswith("error: the SGLang server ended with exit code")
        and "no_such_backend" in errors
    )
    assert_nobody_left(tmp_path / "run")


def test_a_trainer_that_refuses_its_settings_is_one_clear_message(
    inputs: Inputs, tmp_path: Path
) -> None:
    child = start(inputs.config(tmp_path / "run", megatron={"adam_betta1": 0.9}))
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert "megatron.adam_betta1" in errors and "adam_beta1" in errors
    assert_nobody_left(tmp_path / "run")
