"""A short run of the whole system, without stand-ins.

Controller, rollout worker with its SGLang server, reward worker and two trainer ranks (TP=2) train
a random model; requests are in flight at every weight update. The run exports the policy of every
version. So the engine's logprob of each token can be compared with a fresh prefill by transformers
under the weights that the token is labelled with, and under those of neighbouring versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from needs import needs_engine
from tiny_model import CPU_ENGINE
from whole_runs import (
    RUN_MAX_STALENESS,
    RUN_STEPS,
    FinishedRun,
    RunInputs,
    assert_no_process_left,
    fresh_logprobs,
    load_policy,
    start_run,
)

from megatron_async_rl.controller.journal.events import PartialSaved
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.observability.sample_log import SampleLine

pytestmark = needs_engine


@pytest.fixture(scope="module")
def run(run_inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("loop") / "run"
    child = start_run(run_inputs.config(folder, monitor={"trace_steps": [2]}))
    output, errors = child.communicate(timeout=500)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    yield FinishedRun(folder, output)


def test_run_finishes_reports_evaluation_and_leaves_no_process(run: FinishedRun) -> None:
    assert run.status.state == "finished"
    assert run.status.version == RUN_STEPS
    assert [evaluation.version for evaluation in run.status.evals] == [0, RUN_STEPS]
    assert "before" in run.output and "after" in run.output
    assert_no_process_left(run.folder)


def test_every_group_is_accounted_for(run: FinishedRun) -> None:
    ledger = run.status.ledger
    dropped = sum(count for name, count in ledger.items() if name.startswith("dropped."))
    assert ledger["admitted"] == ledger["trained"] + dropped + ledger["pending"]
    assert ledger["trained"] == RUN_STEPS * 4 and ledger["pending"] == 0
    trained = [(line.group_id, line.index) for line in run.samples]
    assert len(trained) == len(set(trained)) == RUN_STEPS * 16


def test_no_trained_token_exceeds_max_staleness(run: FinishedRun) -> None:
    lags = [line.version - version for line in run.samples for version, _ in line.versions]
    assert max(lags) <= RUN_MAX_STALENESS
    assert max(lags) >= 1  # the run was asynchronous


def test_updates_interrupt_requests_and_samples_span_versions(run: FinishedRun) -> None:
    served = [line for line in run.log("controller").splitlines() if " is served by " in line]
    in_flight = [line for line in served if " 0 requests interrupted" not in line]
    assert len(served) == RUN_STEPS + 1
    assert len(in_flight) >= 3
    assert any(len(line.versions) >= 2 for line in run.samples)


def test_every_update_is_verified_by_digests(run: FinishedRun) -> None:
    assert "digest mismatch" not in run.log("rollout-0")
    served = [
        line for line in run.log("controller").splitlines() if " is served by rollout-0" in line
    ]
    assert all("trainer_digest " in line for line in served) and len(served) == RUN_STEPS + 1


def difference_from_fresh_prefills(run: FinishedRun, line: SampleLine, num_spans: int) -> float:
    """Returns the largest difference from prefills under neighbouring versions.

    Asserts that the first `num_spans` spans equal a fresh prefill under the labelled weights.
    """
    done, wrong_version = 0, 0.0
    for version, count in line.versions[:num_spans]:
        these = slice(done, done + count)
        logprobs = np.asarray(line.logprobs[these])
        np.testing.assert_allclose(
            logprobs, fresh_logprobs(run.folder, version, line)[these], atol=1e-3
        )
        other = fresh_logprobs(
            run.folder, version + 1 if version < RUN_STEPS else version - 1, line
        )
        wrong_version = max(wrong_version, float(np.abs(logprobs - other[these]).max()))
        done += count
    return wrong_version


def test_logprobs_of_interrupted_samples_match_a_fresh_prefill(run: FinishedRun) -> None:
    spanning = [line for line in run.samples if len(line.versions) >= 2][:12]
    wrong_version = max(
        difference_from_fresh_prefills(run, line, len(line.versions)) for line in spanning
    )
    # the weights differ enough to reveal a stale cache or a wrong label
    assert wrong_version > 0.01


@pytest.mark.parametrize(
    "weights", [{"interrupt": "retract"}, {"kv_cache": "keep"}], ids=["retract", "keep"]
)
def test_requests_may_stay_in_the_engine_during_updates(
    weights: dict[str, str], run_inputs: RunInputs, tmp_path: Path
) -> None:
    """With kv_cache = keep only the first span equals a fresh prefill.

    process/test_interruption.py checks the later spans.
    """
    settings = {"run": {"steps": 4}, "evaluation": {"sets": {}}, "weights": weights}
    child = start_run(run_inputs.config(tmp_path / "run", **settings))
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(tmp_path / "run", output)
    assert run.status.ledger["trained"] == 4 * 4 and run.status.ledger["pending"] == 0
    spanning = [line for line in run.samples if len(line.versions) >= 2]
    spans = 1 if "kv_cache" in weights else None
    wrong_version = max(
        difference_from_fresh_prefills(run, line, spans or len(line.versions)) for line in spanning
    )
    assert wrong_version > 0.01
    assert_no_process_left(run.folder)


def test_finish_overlaps_one_step_and_interrupts_nothing(
    run: FinishedRun, run_inputs: RunInputs, tmp_path: Path
) -> None:
    """One-step overlap: a whole batch runs at once, and the servers are one version behind.

    Also trains on the prompts alone that an earlier run did not solve too rarely (data.filter).
    """
    rewards: dict[str, list[float]] = {}
    for line in run.samples:
        rewards.setdefault(line.prompt_id, []).append(line.reward)
    rates = {prompt: float(np.mean(values)) for prompt, values in rewards.items()}
    least = float(np.median(list(rates.values())))
    too_hard = {prompt for prompt, rate in rates.items() if rate < least}
    path = run_inputs.config(
        tmp_path / "run",
        run={"steps": 4, "export_every": 0},
        data={"filter": {"run": str(run.folder), "min": least}},
        evaluation={"sets": {}},
        rollout={"max_concurrent_samples": 16},
        staleness={"max_staleness": 1},
        weights={"interrupt": "finish"},
    )
    child = start_run(path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    earlier, run = run, FinishedRun(tmp_path / "run", output)
    assert too_hard and not too_hard & {line.prompt_id for line in run.samples}
    counts = f"leaves out {len(too_hard)} prompts with a success rate below {least:g} and 0 above 1"
    assert f"{counts} of 60 in data.train = {run_inputs.train};" in run.log("controller")
    assert f"{60 - len(rates)} were not sampled in {earlier.folder}" in run.log("controller")
    assert run.status.ledger["trained"] == 4 * 4
    assert all(len(line.versions) == 1 for line in run.samples)
    assert {line.version - line.versions[0][0] for line in run.samples} == {0, 1}
    served = [line for line in run.log("controller").splitlines() if " is served by " in line]
    assert served and all(" 0 requests interrupted" in line for line in served)
    assert any("drain " in line for line in served)
    events = read_events(run.folder / JOURNAL_FILE)
    assert not any(isinstance(event, PartialSaved) for event in events)
    assert_no_process_left(run.folder)


def test_engine_and_transformers_agree_on_the_exported_policy(run: FinishedRun) -> None:
    whole = [line for line in run.samples if len(line.versions) == 1 and line.versions[0][0] > 0][
        :8
    ]
    assert whole
    for line in whole:
        np.testing.assert_allclose(
            line.logprobs, fresh_logprobs(run.folder, line.versions[0][0], line), atol=1e-3
        )


def test_trained_policy_folder_loads_in_transformers(run: FinishedRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    last = load_policy(run.folder, RUN_STEPS).state_dict()
    final = AutoModelForCausalLM.from_pretrained(
        run.folder / "policy", dtype="float32"
    ).state_dict()
    assert final.keys() == last.keys() and all(
        torch.equal(final[name], last[name]) for name in final
    )
    assert AutoTokenizer.from_pretrained(run.folder / "policy").encode("1+2=")
    assert not all(
        torch.equal(final[name], load_policy(run.folder, 0).state_dict()[name]) for name in final
    )


def test_tensorboard_has_the_run(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {
        "reward/mean",
        "train/loss",
        "staleness/max",
        "sync/total_s",
        "eval/held_out/accuracy",
    } <= set(tags["scalars"])
    assert {"staleness/per_token", "rollout/response_tokens", "rollout/versions_per_sample"} <= set(
        tags["histograms"]
    )
    assert len(events.Scalars("train/loss")) == RUN_STEPS


def test_megatron_and_the_engine_agree_on_the_same_weights(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    first = {
        tag: events.Scalars(f"train/{tag}")[0].value
        for tag in ("current_version_fraction", "logprob_diff_max")
    }
    assert first["current_version_fraction"] == 1.0  # the whole first batch is of version 0
    assert first["logprob_diff_max"] < 1e-3


def test_every_step_has_a_mismatch_probe_or_no_figure(run: FinishedRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    probed = events.Scalars("probe/logprob_diff_max")
    # an update may come before the answer, most of all on a loaded machine
    assert len(probed) >= RUN_STEPS // 2
    assert max(event.value for event in probed) < 1e-3
    assert min(event.value for event in events.Scalars("probe/tokens")) > 4
    # those of staleness 0: only the steps that trained on some
    current = {e.step: e.value for e in events.Scalars("train/current_version_fraction")}
    compared = {event.step for event in events.Scalars("train/logprob_diff_mean")}
    assert compared <= {step for step, fraction in current.items() if fraction > 0}


def test_trace_of_a_step_shows_all_processes(run: FinishedRun) -> None:
    [path] = (run.folder / "trace").iterdir()
    assert path.name == "v2.json"
    events = json.loads(path.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    seconds: dict[tuple[str, str], float] = {}
    for event in (event for event in events if event["ph"] == "X"):
        kind = processes[event["pid"]], event["name"].split()[0]
        seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6
    for kind in (
        ("rollout-0", "generate"), ("rollout-0", "update"), ("rollout-0", "load"),
        ("reward-0", "reward"), ("trainer-0", "wait"), ("trainer-0", "step"),
        ("trainer-0", "train"), ("trainer-0", "proximal"), ("trainer-0", "send"),
    ):  # fmt: skip
        assert seconds.get(kind, 0.0) > 0, kind
    assert seconds["trainer-0", "train"] < seconds["trainer-0", "step"]


def test_keys_are_private_and_in_no_log(run: FinishedRun) -> None:
    for path in (run.folder / "keys").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    keys = yaml.safe_load((run.folder / "keys" / "rollout-0.sglang.yaml").read_text())
    for log in (run.folder / "logs").iterdir():
        assert not any(key in log.read_text() for key in keys.values()), log


def test_engine_failure_at_startup_is_one_clear_error(
    run_inputs: RunInputs, tmp_path: Path
) -> None:
    child = start_run(
        run_inputs.config(tmp_path / "run", sglang=CPU_ENGINE | {"attention_backend": "fa3"})
    )  # a choice that SGLang knows and refuses on a CPU
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert (
        errors.startswith("error: the SGLang server ended with exit code")
        and "FlashAttention v3 Backend requires" in errors
    )
    assert_no_process_left(tmp_path / "run")


def test_refused_trainer_setting_is_one_clear_error(run_inputs: RunInputs, tmp_path: Path) -> None:
    child = start_run(run_inputs.config(tmp_path / "run", megatron={"adam_betta1": 0.9}))
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert "megatron.adam_betta1" in errors and "adam_beta1" in errors
    assert_no_process_left(tmp_path / "run")
