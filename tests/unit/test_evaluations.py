"""Evaluations in the controller: when they are due, skipped, abandoned and continued, on disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from config_builders import config_tree
from core_builders import generated, make_core, messages_of, scored

from megatron_async_rl.config import load as configuration
from megatron_async_rl.controller.context import Context
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, FinishEvaluation, ReportEvaluated
from megatron_async_rl.controller.evaluation import records
from megatron_async_rl.controller.evaluation.evaluation import Evaluations
from megatron_async_rl.controller.evaluation.records import EvaluatedSample, SampleFile
from megatron_async_rl.controller.monitoring.progress import Progress
from megatron_async_rl.controller.weight_sync.catch_up import CatchUp
from megatron_async_rl.controller.weight_sync.snapshot import SnapshotStore
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.protocol.messages import Generate, ScoreRequest
from megatron_async_rl.protocol.types import Prompt

SETS = {"aime": {"path": "unused", "samples": 2, "temperature": 1.0}}
PROMPTS = {
    "aime": [Prompt(f"p{n}", np.arange(3, dtype=np.int32), {"rating": 1500}) for n in range(2)]
}


class Shell:
    """A core with two servers and the evaluations of a run, in place of queue and workers."""

    def __init__(self, run_dir: Path, steps: int = 8, **evaluation: Any) -> None:
        tree = config_tree(
            run={"dir": str(run_dir), "steps": steps},
            rollout={"servers": 2, "max_new_tokens": 8},
            evaluation={"sets": SETS, **evaluation},
            monitor={"loggers": []},
        )
        self.config = configuration.from_tree(tree)
        self.core = make_core(steps=steps, max_staleness=8)
        self.core.admitting = False
        self.progress = Progress(RunLog(run_dir, self.config), self.config)
        context = Context(self.config, self.core, self, self, None, self.progress)  # type: ignore[arg-type]
        self.catch_up = CatchUp(context, SnapshotStore(self.config))
        self.evaluations = Evaluations(context, PROMPTS, self.catch_up)
        self.leases: list[Generate] = []
        self.core.handle(inputs.RewardJoined("reward-0", 100), 0)
        for name in ("rollout-0", "rollout-1"):
            self.core.handle(inputs.RolloutJoined(name, 4), 0)
            self.core.handle(inputs.ServerUpdated(name, version=0), 0)

    async def submit(self, event: inputs.CoreEvent) -> None:
        self.carry_out(self.core.handle(event, 0))

    def wake(self) -> None:
        """Nothing waits for a server here."""

    def carry_out(self, actions: list[Action]) -> None:
        leases = messages_of(actions, Generate)
        self.leases += [lease for lease in leases if lease.purpose == "eval"]
        for action in actions:
            if isinstance(action, ReportEvaluated):
                self.evaluations.sample_ended(action)
            elif isinstance(action, FinishEvaluation):
                self.evaluations.finish(action)

    def finish_one(self) -> None:
        lease = self.leases.pop(0)
        server = self.core.state.groups[lease.group_id].worker
        version = self.core.fleet.rollout[server].version
        returned = self.core.handle(inputs.Received(server, generated(lease, 0, version)), 0)
        self.carry_out(returned)
        [score] = messages_of(returned, ScoreRequest)
        self.carry_out(self.core.handle(inputs.Received("reward-0", scored(score)), 0))


def in_loop(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evaluation", "due"),
    [
        ({}, [0, 8]),
        ({"every": 3}, [0, 3, 6, 8]),
        ({"every": 4, "before": False}, [4, 8]),
        ({"after": False}, [0]),
        ({"sets": SETS, "before": False, "after": False}, []),
    ],
)
def test_evaluation_is_due_before_after_and_every_nth_version(
    tmp_path: Path, evaluation: dict[str, Any], due: list[int]
) -> None:
    evaluations = Shell(tmp_path, **evaluation).evaluations
    assert [version for version in range(9) if evaluations.is_due(version)] == due


def test_result_is_written_and_the_evaluation_is_not_repeated(tmp_path: Path) -> None:
    shell = Shell(tmp_path)

    async def body() -> None:
        await shell.evaluations.begin(0)
        assert shell.progress.state == "evaluating"
        while shell.leases:
            shell.finish_one()
        await shell.evaluations.ended()

    in_loop(body)
    result = json.loads((tmp_path / "evaluations" / "v0.json").read_text())
    assert (result["version"], result["oldest_version"], result["newest_version"]) == (0, 0, 0)
    metrics = result["sets"]["aime"]["metrics"]
    assert (metrics["accuracy"], metrics["pass_at_2"], metrics["problems"]) == (1, 1, 2)
    # every problem was solved: a bound, where four solutions have a probability of 5 %
    assert "rating" not in metrics and metrics["rating_low"] == pytest.approx(1481.1, abs=0.1)
    assert result["sets"]["aime"]["problems"][0]["rewards"] == [1, 1]
    assert not Shell(tmp_path).evaluations.is_due(0)


def test_problems_with_the_longest_answers_are_evaluated_first(tmp_path: Path) -> None:
    problems = [{"prompt_id": "p0", "tokens": [3, 5]}, {"prompt_id": "p1", "tokens": [9, 7]}]
    result = {"version": 3, "sets": {"aime": {"metrics": {}, "problems": problems}}}
    (tmp_path / "evaluations").mkdir()
    records.write_result(tmp_path, 3, result)
    for _ in range(2):  # the order is that of a restarted controller too
        shell = Shell(tmp_path, every=4, mode="mixed")
        in_loop(lambda shell=shell: shell.evaluations.begin(4))  # type: ignore[misc]
        assert [lease.prompt.prompt_id for lease in shell.leases] == ["p1", "p1"]


def test_failed_samples_have_no_length(tmp_path: Path) -> None:
    problems = [{"prompt_id": "p0", "tokens": [0, 6]}, {"prompt_id": "p1", "tokens": [0, 0]}]
    result = {"version": 3, "sets": {"aime": {"metrics": {}, "problems": problems}}}
    (tmp_path / "evaluations").mkdir()
    records.write_result(tmp_path, 3, result)
    assert records.mean_tokens(tmp_path, 3) == {("aime", "p0"): 6.0}


def test_evaluation_that_is_due_while_one_runs_is_skipped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shell = Shell(tmp_path, every=1, mode="mixed")

    async def body() -> None:
        await shell.evaluations.begin(0)
        await shell.evaluations.begin(1)
        await shell.evaluations.allow_update(1)  # training does not wait
        assert "version 1 is skipped: that of version 0 is not complete" in caplog.text
        while shell.leases:
            shell.finish_one()
        await shell.evaluations.ended()

    in_loop(body)
    assert (tmp_path / "evaluations" / "v0.json").exists()


def test_evaluation_of_a_version_that_is_served_again_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server joined, and the trainer sent it the version once more."""
    shell = Shell(tmp_path)

    async def body() -> None:
        for _ in range(2):
            await shell.evaluations.begin(0)
        assert len(shell.leases) == 4 and "skipped" not in caplog.text

    in_loop(body)


def test_evaluation_of_version_0_leaves_the_state_of_a_run_that_trains(tmp_path: Path) -> None:
    """It was abandoned, or not configured, when training began; then the run was resumed."""
    shell = Shell(tmp_path)
    shell.core.admitting = True
    shell.progress.begin_training()

    async def body() -> None:
        await shell.evaluations.begin(0)
        assert shell.leases and shell.progress.training
        shell.core.state.version = 8
        await shell.submit(inputs.EvaluationAbandoned("the run is over"))
        await shell.evaluations.begin(8)
        assert shell.progress.state == "evaluating"

    in_loop(body)


def test_update_waits_for_an_evaluation_that_pauses(tmp_path: Path) -> None:
    shell = Shell(tmp_path, every=1)

    async def body() -> None:
        await shell.evaluations.begin(0)
        await shell.evaluations.allow_update(0)  # the same version again
        update = asyncio.create_task(shell.evaluations.allow_update(1))
        await asyncio.sleep(0)
        assert not update.done()
        while shell.leases:
            shell.finish_one()
        await update

    in_loop(body)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (["rollout-0"], "its servers were lost, and no other serves version 0 or has its snapshot"),
        (["rollout-1"], "its server is the only one left and is needed for training"),
    ],
)
def test_held_server_evaluation_is_abandoned_instead_of_blocking(
    tmp_path: Path, lost: list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    shell = Shell(tmp_path, every=1, mode="held_server")

    async def body() -> None:
        await shell.evaluations.begin(0)
        await shell.evaluations.check()
        assert not caplog.messages or "abandoned" not in caplog.text
        for name in lost:
            await shell.submit(inputs.WorkerLost(name))
        await shell.evaluations.check()
        await shell.evaluations.ended()

    in_loop(body)
    assert f"version 0 is abandoned after 0 of 4 samples: {reason}" in caplog.text
    assert not (tmp_path / "evaluations" / "v0.json").exists()


def test_interrupted_evaluation_continues_with_its_samples(tmp_path: Path) -> None:
    first = Shell(tmp_path)

    async def interrupted() -> None:
        await first.evaluations.begin(0)
        first.finish_one()

    in_loop(interrupted)
    with (tmp_path / "evaluations" / "v0.samples.jsonl").open("ab") as file:
        file.write(b'{"set": "aime", "promp')  # a crash cut this line off
    again = Shell(tmp_path)

    async def rest() -> None:
        await again.evaluations.begin(0)
        assert len(again.leases) == 3
        while again.leases:
            again.finish_one()
        await again.evaluations.ended()

    in_loop(rest)
    result = json.loads((tmp_path / "evaluations" / "v0.json").read_text())
    assert [p["rewards"] for p in result["sets"]["aime"]["problems"]] == [[1, 1], [1, 1]]
    lines = (tmp_path / "evaluations" / "v0.samples.jsonl").read_text().splitlines()
    keys = {msgspec.json.decode(line, type=EvaluatedSample).key for line in lines[1:]}
    assert len(lines) == 5 and len(keys) == 4


def test_samples_of_other_settings_are_kept_under_another_name(tmp_path: Path) -> None:
    sample = EvaluatedSample("aime", "p0", 0, 1.0, text="2")
    for temperature, failed in ((0.5, None), (1.0, None), (1.0, "p1")):
        file = SampleFile(tmp_path, 3, {"temperature": temperature})
        if failed:
            assert file.samples == [msgspec.structs.replace(sample, text="")]
            file.append(EvaluatedSample("aime", failed, 0, None))
        else:
            assert file.samples == []
            file.append(sample)
        file.close()
    folder = tmp_path / "evaluations"
    assert sorted(path.name for path in folder.iterdir()) == [
        "v3.samples.jsonl",
        "v3.samples.jsonl.1",
    ]
    assert len(SampleFile(tmp_path, 3, {"temperature": 1.0}).samples) == 1  # failed: tried again


def test_damaged_result_is_named_and_evaluated_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "v0.json").write_text('{"version": 0, "sets"')
    assert records.read_results(tmp_path) == []
    assert "v0.json is ignored" in caplog.text


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"sets": SETS, "mode": "held_server"}, "held_server needs rollout.servers >= 2"),
        ({"sets": {"a b": {"path": "x"}}}, "'a b' cannot name a set"),
        ({"sets": {"a.b": {"path": "x", "sample": 4}}}, "'a.b' cannot name a set"),
        ({"sets": {"a": {"path": "x", "samples": 2}}}, "a.samples = 2 with temperature = 0"),
        ({"sets": {"a": {"path": "x", "max_new_tokens": 128}}}, "no room for a prompt"),
        ({"sets": {"a": {"samples": 2}}}, "evaluation.sets.a.path is not set"),
        ({"sets": {"a": {"path": "x", "sample": 2}}}, "did you mean evaluation.sets.a.samples"),
    ],
)
def test_impossible_evaluation_is_rejected_by_name(
    evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.from_tree(config_tree(evaluation=evaluation))


def test_run_without_steps_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"run.steps = 0 trains nothing; .*the command eval"):
        configuration.from_tree(config_tree(run={"dir": "r", "steps": 0}))
