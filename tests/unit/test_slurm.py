"""A run over the nodes of a Slurm job: placement, the assignment of nodes, SIGTERM.

Whole jobs with launchers/slurm.sbatch, on a real Slurm of two nodes, are in test_slurm_jobs.py.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from config_builders import config_tree
from hypothesis import assume, given
from hypothesis import strategies as st
from model_shapes import DENSE_32B
from paths import ROOT

from megatron_async_rl.__main__ import main
from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, Error
from megatron_async_rl.launcher import placement, roles, slurm
from megatron_async_rl.launcher.gpus import assign_gpus
from megatron_async_rl.launcher.session import Session
from megatron_async_rl.launcher.supervisor import Supervisor
from megatron_async_rl.model import weight_plan

BIG = ROOT / "configs" / "qwen3_32b_slurm.yaml"


def make_config(
    tp: int = 1, pp: int = 1, dp: int = 1, servers: int = 1, engine_tp: int = 1, **sections: Any
) -> Config:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    sections.setdefault("trainer", {})
    sections["trainer"] = {"data_parallel_size": dp, **sections["trainer"]}
    sections.setdefault("sglang", {"tp_size": engine_tp})
    rollout = {"servers": servers, "max_new_tokens": 8}
    algorithm = {"prompts_per_step": dp, "samples_per_prompt": 2}
    return load.from_tree(
        config_tree(megatron=sizes, rollout=rollout, algorithm=algorithm, **sections)
    )


# ---- placement


@pytest.mark.parametrize(
    ("settings", "nodes", "gpus", "expected", "used"),
    [
        (make_config(), 1, 2, [["controller", "trainer", "rollout-0", "reward-0"]], [2]),
        (make_config(tp=2, dp=2), 2, 4, [
            ["controller", "trainer", "reward-0"], ["rollout-0"]], [4, 1]),
        (make_config(tp=8, pp=2, servers=2, engine_tp=8), 4, 8, [
            ["controller", "trainer-0", "reward-0"], ["trainer-1"], ["rollout-0"], ["rollout-1"]],
            [8] * 4),
        # GPUs left on the trainer's nodes are used first, and a server does not span nodes
        (make_config(tp=2, dp=2, servers=3, engine_tp=2), 2, 6, [
            ["controller", "trainer", "rollout-0", "reward-0"], ["rollout-1", "rollout-2"]],
            [6, 4]),
        (make_config(tp=3, servers=2, engine_tp=2), 2, 4, [
            ["controller", "trainer", "reward-0"], ["rollout-0", "rollout-1"]], [3, 4]),
        # twelve ranks: six a node would split a tensor-parallel group of four
        (make_config(tp=4, pp=3, servers=1, engine_tp=4), 3, 8, [
            ["controller", "trainer-0", "rollout-0", "reward-0"], ["trainer-1"], ["trainer-2"]],
            [8, 4, 4]),
        (make_config(dp=4, servers=1, trainer={"hosts": 4}), 4, 8, [
            ["controller", "trainer-0", "rollout-0", "reward-0"], ["trainer-1"], ["trainer-2"],
            ["trainer-3"]], [2, 1, 1, 1]),
        (make_config(servers=2, run={"dir": "runs/a", "steps": 1, "mode": "rollout_only"}), 2, 1, [
            ["controller", "trainer", "rollout-0", "reward-0"], ["rollout-1"]], [1, 1]),
        # on a CPU servers are placed round robin, first on nodes without trainer ranks
        (make_config(servers=3, sglang={"device": "cpu"}), 2, 0, [
            ["controller", "trainer", "rollout-1", "reward-0"], ["rollout-0", "rollout-2"]],
            [0, 0]),
        (make_config(dp=2, sglang={"device": "cpu"}, trainer={"hosts": 2}), 2, 0, [
            ["controller", "trainer-0", "rollout-0", "reward-0"], ["trainer-1"]], [0, 0]),
    ],
)  # fmt: skip
def test_each_node_gets_its_processes(
    settings: Config, nodes: int, gpus: int, expected: list[list[str]], used: list[int]
) -> None:
    placed = placement.assign_nodes(settings, nodes, gpus)
    assert (placed.names, placed.gpus) == (expected, used)
    assert placed.elsewhere == [name for names in expected[1:] for name in names]


@pytest.mark.parametrize(
    ("settings", "nodes", "gpus", "words"),
    [
        (make_config(tp=8, pp=4, servers=8, engine_tp=4), 6, 8, (
            "4 nodes with 8 trainer ranks each and rollout.servers = 8 "
            "of sglang.tp_size = 4 do not fit on 6 nodes of 8 GPUs",
            "request 8 nodes (--nodes=8), or set rollout.servers to at most 4")),
        (make_config(tp=8, pp=4, servers=1, engine_tp=4), 4, 8, ("request 5 nodes (--nodes=5)",)),
        (make_config(tp=16), 4, 8, (
            "megatron.tensor_model_parallel_size = 16 is more than the 8 GPUs of a node",
            "set it to at most 8")),
        (make_config(engine_tp=16), 4, 8, (
            "sglang.tp_size = 16 is more than the 8 GPUs of a node", "must not span nodes")),
        (make_config(tp=4, pp=4, trainer={"hosts": 8}), 8, 8, (
            "trainer.hosts = 8 puts 16 / 8 = 2 ranks on a node, which splits a group of "
            "megatron.tensor_model_parallel_size = 4",
            "set it to one of 2, 4, or leave it out to use 2")),
        (make_config(dp=32, trainer={"hosts": 2}), 8, 8, (
            "32 / 2 = 16 ranks on a node, but a node has 8 GPUs", "4, 8, 16, 32")),
        (make_config(dp=4, sglang={"device": "cpu"}, trainer={"hosts": 4}), 2, 0, (
            "trainer.hosts = 4 is more than the 2 nodes; request 4 nodes",)),
        (make_config(), 0, 8, ("at least 1 node, not 0",)),
        (make_config(), 1, 1, ("request 2 nodes",)),
    ],
)  # fmt: skip
def test_placement_that_does_not_fit_error_gives_the_remedy(
    settings: Config, nodes: int, gpus: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        placement.assign_nodes(settings, nodes, gpus)
    for word in words:
        assert word in str(refused.value)


SIZES = st.sampled_from([1, 2, 3, 4, 8])


@given(
    tp=SIZES, pp=SIZES, dp=SIZES, servers=st.integers(1, 24), engine_tp=SIZES,
    gpus=st.sampled_from([1, 2, 4, 8]), spare=st.integers(-2, 3), rollout_only=st.booleans(),
)  # fmt: skip
def test_each_process_is_placed_once_and_gpus_are_not_shared(
    tp: int,
    pp: int,
    dp: int,
    servers: int,
    engine_tp: int,
    gpus: int,
    spare: int,
    rollout_only: bool,
) -> None:
    assume(tp <= gpus and engine_tp <= gpus)
    run = {"dir": "runs/a", "steps": 1, "mode": "rollout_only" if rollout_only else "train"}
    settings = make_config(tp, pp, dp, servers, engine_tp, run=run)
    many = placement.assign_nodes(settings, 400, gpus)
    # nodes are filled in order
    enough = max(number for number, names in enumerate(many.names) if names) + 1
    if spare < 0 and enough + spare > 0:
        with pytest.raises(ConfigError, match=rf"request {enough} nodes"):
            placement.assign_nodes(settings, enough + spare, gpus)
        return
    placed = placement.assign_nodes(settings, enough + max(0, spare), gpus)

    hosts = msgspec.structs.replace(settings.trainer, hosts=placed.trainer_hosts)
    resolved = msgspec.structs.replace(settings, trainer=hosts)
    assert sorted(name for names in placed.names for name in names) == sorted(roles.names(resolved))
    assert {"controller", "reward-0", resolved.trainer_names[0]} <= set(placed.names[0])
    for names, used in zip(placed.names, placed.gpus, strict=True):
        # raises if a node has too few
        shares = assign_gpus(resolved, [str(gpu) for gpu in range(gpus)], names)
        given_out = [gpu for share in shares.values() for gpu in share.split(",")]
        assert len(given_out) == len(set(given_out)) == used <= gpus
        assert all(
            len(share.split(",")) == engine_tp
            for name, share in shares.items()
            if name.startswith("rollout")
        )
        ranks = [
            len(share.split(",")) for name, share in shares.items() if name.startswith("trainer")
        ]
        assert all(count % tp == 0 for count in ranks)  # no tensor-parallel group is on two nodes
    assert bool(placed.warnings()) == (sum(placed.gpus) < len(placed.gpus) * gpus)


def test_idle_gpus_and_nodes_are_warned_about() -> None:
    waste, idle = placement.assign_nodes(make_config(tp=2, servers=1, engine_tp=2), 3, 4).warnings()
    assert waste == "no process runs on node 1, 2: request 1 nodes"
    assert idle.startswith("8 of 12 GPUs are idle: 4 of node 1, 4 of node 2")
    assert placement.assign_nodes(make_config(sglang={"device": "cpu"}), 2, 8).warnings() == []


# ---- the plan, without Slurm


def test_placement_is_printed_without_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "slurm",
                str(BIG),
                "rollout.servers=7",
                "--plan",
                "--nodes",
                "8",
                "--gpus-per-node",
                "8",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert (
        "0 controller, trainer-0, reward-0..1 8 of 8".split() in lines
        and "7 rollout-6 4 of 8".split() in lines
    )
    assert "warning: 4 of 64 GPUs are idle: 4 of node 7" in shown
    assert (
        f"sbatch --nodes=8 --gpus-per-node=8 launchers/slurm.sbatch {BIG} rollout.servers=7"
        in shown
    )
    assert main(["slurm", str(BIG), "--plan", "--nodes", "5", "--gpus-per-node", "8"]) == 2
    assert (
        "request 8 nodes (--nodes=8), or set rollout.servers to at most 2"
        in capsys.readouterr().err
    )
    assert main(["slurm", str(BIG), "--plan"]) == 2
    assert (
        "--plan needs the size of the job, such as --nodes 4 --gpus-per-node 8"
        in capsys.readouterr().err
    )


def test_eight_node_configuration_is_placed_and_mapped(
    tmp_path: Path,
) -> None:
    extra = {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    }
    (tmp_path / "config.json").write_text(json.dumps(DENSE_32B | extra))
    settings = load.load(BIG, [f"model.path={tmp_path}"])
    placed = placement.assign_nodes(settings, 8, 8)
    assert placed.trainer_hosts == 4 and placed.gpus == [8] * 8 and placed.warnings() == []
    plan = weight_plan.make(settings, 50.0)  # checks the layout and the mapping
    assert round(plan.total_bytes / 1e9) == 66 and plan.engine == {"tp": 4, "servers": 8}
    script = (ROOT / "launchers" / "slurm.sbatch").read_text()
    # saved before the time limit
    assert "--signal=B:TERM@300" in script and settings.faults.shutdown_grace_s < 300


# ---- node assignments


def allocation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: str | None
) -> slurm.Allocation:
    """Returns the allocation of a task on two nodes; `scontrol` is a script."""
    scontrol = folder / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    step = {"STEP_ID": "0", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "STEP_NODELIST": "n[1-2]"}
    for name, value in (
        {"JOB_ID": "7", "NODEID": "1", "GPUS_ON_NODE": "8"} | step | changes
    ).items():
        if value is not None:
            monkeypatch.setenv(f"SLURM_{name}", value)
    return slurm.Allocation.from_environment()


def test_task_reads_its_node_and_job_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allocation(tmp_path, monkeypatch) == slurm.Allocation("7.0.0", ["n1", "n2"], 1, 8)
    assert allocation(tmp_path, monkeypatch, RESTART_COUNT="2").attempt == "7.0.2"
    for missing, words in (
        (
            "JOB_ID",
            "SLURM_JOB_ID is not set: this is not a Slurm job; "
            "submit with sbatch launchers/slurm.sbatch CONFIG",
        ),
        ("STEP_ID", "start `slurm` with srun, one task per node"),
    ):
        with pytest.raises(ConfigError, match=words):
            allocation(tmp_path, monkeypatch, **{missing: None})
    with pytest.raises(ConfigError, match=r"16 tasks on 2 nodes: expected one per node"):
        allocation(tmp_path, monkeypatch, STEP_NUM_TASKS="16")
    with pytest.raises(Error, match=r"scontrol show hostnames n\[1-3\]: "):
        allocation(tmp_path, monkeypatch, STEP_NODELIST="n[1-3]")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"STEP_NUM_TASKS": None}, "SLURM_STEP_NUM_TASKS is not set"),
        ({"STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        ({"NODEID": "2"}, "SLURM_NODEID = 2: they do not belong to one step; submit with sbatch"),
        ({"NODEID": ""}, "SLURM_NODEID is not set"),
        ({"NODEID": "-1"}, "SLURM_NODEID = '-1': expected a number"),
        ({"GPUS_ON_NODE": "gpu:a:4,gpu:b:4"}, "SLURM_GPUS_ON_NODE = 'gpu:a:4,gpu:b:4': expected"),
        ({"GPUS_ON_NODE": "gpu:many"}, "SLURM_GPUS_ON_NODE = 'gpu:many': expected a number"),
    ],
)
def test_wrong_variable_of_slurm_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str | None],
    words: str,
) -> None:
    with pytest.raises(ConfigError, match=words):
        allocation(tmp_path, monkeypatch, **environment)


@pytest.mark.parametrize("value", ["8", "gpu:8", "gpu:h100:8", "gpu:h100-80g:8(S:0-1)"])
def test_number_of_gpus_is_read_in_each_form_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    assert allocation(tmp_path, monkeypatch, GPUS_ON_NODE=value).gpus_per_node == 8


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # a batch script
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, True),
    ],
)
def test_run_that_srun_starts_several_times_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], refused: bool
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not refused:
        return slurm.check_started_once()
    with pytest.raises(ConfigError, match=r"task \d of the 4 that srun started.*`slurm CONFIG`"):
        slurm.check_started_once()


def test_run_on_one_of_several_nodes_warns_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert slurm.idle_nodes_warning() == ""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert "the job has 4 nodes" in slurm.idle_nodes_warning()


def test_assignment_of_an_earlier_job_attempt_is_ignored(tmp_path: Path) -> None:
    settings = make_config(
        run={"dir": str(tmp_path / "run"), "steps": 1}, trainer={"start_timeout_s": 0.3}
    )
    here = slurm.Allocation("7.0.1", ["n1", "n2"], 1, 8)
    (tmp_path / ".run.job-7.0.0").write_bytes(
        msgspec.json.encode(slurm.NodeAssignments([["controller"], ["rollout-0"]]))
    )
    assignments = tmp_path / ".run.job-7.0.1"
    with pytest.raises(
        Error,
        match=r"no assignment from the first node, n1, within trainer\.start_timeout_s = 0 s",
    ):
        slurm._other_node(here, assignments, settings)
    assignments.write_bytes(msgspec.json.encode(slurm.NodeAssignments(over=True)))
    # the first node could not start the run and has reported why
    assert slurm._other_node(here, assignments, settings) == 0
    assignments.write_bytes(msgspec.json.encode(slurm.NodeAssignments([["controller"], []])))
    assert slurm._other_node(here, assignments, settings) == 0  # nothing to do here
    assignments.write_bytes(
        msgspec.json.encode(slurm.NodeAssignments([["controller"], ["rollout-0"]]))
    )
    # test_slurm_jobs.py has real joins
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        slurm._other_node(here, assignments, settings)


def test_patient_run_ignores_a_second_sigterm(tmp_path: Path) -> None:
    settings = make_config()
    for patient, interrupted in ((True, 0), (False, signal.SIGTERM)):
        session = Session(tmp_path, Supervisor(tmp_path, settings.faults, print), 60.0, patient)
        with session.handle_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert session.preempted and session.interrupted == interrupted
            os.kill(os.getpid(), signal.SIGINT)
            assert session.interrupted == signal.SIGINT
