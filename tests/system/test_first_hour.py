"""The first hour of a newcomer: every command of README.md, typed with a fresh login's environment.

A run is stopped too early, killed and interrupted, and then looked at with every other command. A
reward function that always raises, a workflow that always raises and a filter that nothing passes
each end a run with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from descendants import Descendants
from needs import needs_engine
from paths import ROOT, SUPPORT
from train_samples import make_train_samples
from whole_runs import SHORT_ROLLOUT, RunInputs, wait_for_version

from megatron_async_rl import processes
from megatron_async_rl.cli.arguments import make_parser
from megatron_async_rl.controller.journal.events import BatchTrained
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.launcher.session import STOP_GRACE_S
from megatron_async_rl.observability.sample_log import read_samples
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.storage import batches

SCRIPT = "launchers/megatron-async-rl"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED = re.compile(rf"^[^\n#|]*?{SCRIPT} ([^`#\n]+(?:\n[^`#\n]+(?=`))?)", re.MULTILINE)
TYPED_ELSEWHERE = {"compare-logprobs"}  # starts servers and ranks of its own, in its own test
NAMES = list(next(action.choices for action in make_parser()._actions if action.choices))


def commands(page: Path) -> list[str]:
    """Returns the arguments of each command on a page: in text, and in the README's table."""
    text = page.read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) if page.name == "README.md" else []
    found = [row for row in rows if row.split()[0] in NAMES]
    return found + [typed for typed in TYPED.findall(text) if typed.split()[0] in NAMES]


def as_arguments(command: str) -> list[str]:
    """Returns the arguments with optional parts, and with numbers for the placeholders."""
    text = re.sub(r"\[([^]]*)\]", r"\1", command).replace("...", "")
    return [re.sub(r"^[NG]$", "2", word) for word in shlex.split(text)]


def login(**variables: str) -> dict[str, str]:
    """Returns the environment of a fresh login."""
    names = ("HOME", "PATH", "TMPDIR", "MEGATRON_ASYNC_RL_CACHE")
    return {name: os.environ[name] for name in names if name in os.environ} | variables


class Shell:
    """A shell with the Python of the environment and the folder of the user's own functions.

    The processes that it starts make their temporary files in `temporary`.
    """

    def __init__(self, temporary: str) -> None:
        self.typed: set[str] = set()
        engine = os.environ.get("MEGATRON_ASYNC_RL_ENGINE_PYTHON")
        self._environment = login(
            MEGATRON_ASYNC_RL_PYTHON=sys.executable,
            PYTHONPATH=str(SUPPORT),
            TMPDIR=temporary,
            **({"MEGATRON_ASYNC_RL_ENGINE_PYTHON": engine} if engine else {}),
        )

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        self.typed.add(str(words[0]))
        return subprocess.Popen(
            [ROOT / SCRIPT, *words],
            env=self._environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=processes.die_with_parent,  # ends with pytest, even if that is killed
        )

    def type(self, *words: str | Path, code: int = 0) -> str:
        """Runs a command to its end and returns its output, in one line without frames."""
        child = self.start(*words)
        output, errors = child.communicate(timeout=200)
        assert child.returncode == code, output[-3000:] + errors[-3000:]
        return " ".join((output + errors).replace("│", " ").split())


@pytest.fixture
def shell() -> Shell:
    return Shell(tempfile.gettempdir())


def test_every_command_is_documented_in_the_readme() -> None:
    documented = {command.split()[0] for command in commands(ROOT / "README.md")}
    assert documented == set(NAMES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_accepted(page: Path) -> None:
    for command in commands(page):
        _, rest = make_parser().parse_known_args(as_arguments(command))
        assert not [word for word in rest if "=" not in word], command


def test_documents_use_one_form() -> None:
    other = re.compile(r"python3? -m megatron_async_rl(?![.\w])|tensorboard --logdir")
    assert [page.name for page in PAGES if other.search(page.read_text())] == []


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_command_as_it_is_typed(shell: Shell, name: str) -> None:
    assert f"{SCRIPT} {name}" in shell.type(name, "--help")


@pytest.mark.skipif(
    not Path(sys.prefix, ".complete").exists(), reason="not the Python of tools/setup_env.sh"
)
def test_environment_is_found_without_a_variable() -> None:
    done = subprocess.run(
        [ROOT / SCRIPT, "--version"], env=login(), cwd="/", capture_output=True, text=True
    )
    assert done.stdout.startswith("megatron_async_rl "), done.stderr


@pytest.mark.skipif(
    not Path(sys.prefix, ".complete").exists(), reason="not the Python of tools/setup_env.sh"
)
def test_installation_on_a_laptop_works_as_written() -> None:
    page = (ROOT / "docs" / "installation.md").read_text()
    [commands] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(
        ["bash", "-e", "-c", commands], env=login(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "no problems" in done.stdout, done.stdout + done.stderr


def test_links_to_the_script_work(tmp_path: Path) -> None:
    (tmp_path / "marl").symlink_to(ROOT / SCRIPT)
    environment = login(MEGATRON_ASYNC_RL_PYTHON=sys.executable)
    done = subprocess.run(
        [tmp_path / "marl", "--version"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("megatron_async_rl "), done.stderr


@needs_engine
def test_run_is_stopped_killed_interrupted_and_looked_at(
    run_inputs: RunInputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def config(seed: int) -> Path:
        """Also covers max_staleness = 0 and two pipeline stages that each send their weights."""
        return run_inputs.config(
            run_dir,
            run={"steps": 5000, "export_every": 0, "seed": seed},
            evaluation={"sets": {}},
            rollout=SHORT_ROLLOUT,
            staleness={"max_staleness": 0},
            weights={"bucket_bytes": 65536, "snapshot_every": 1},
            megatron={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
        )

    with tempfile.TemporaryDirectory() as temporary:
        shell = Shell(temporary)
        look_before(shell, config(3), tmp_path)
        stop_before_the_first_step(shell, config(3), run_dir)
        kill(shell, config(4), run_dir)  # a run without a step does not claim the folder
        interrupt(shell, run_dir)
        look_after(shell, run_dir, run_inputs, tmp_path)
        assert shell.typed == set(NAMES) - TYPED_ELSEWHERE
        deadline = time.monotonic() + 30  # after a kill another process removes the files
        while (left := left_in(temporary)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []


def left_in(folder: str) -> list[str]:
    """Returns the names of temporary files; the cache of torch.compile is kept on purpose."""
    names = (path.name for path in Path(folder).iterdir())
    return [name for name in names if not name.startswith("torchinductor_")]


def look_before(shell: Shell, config: Path, folder: Path) -> None:
    """Makes rows, and checks a configuration."""
    raw = folder / "raw.jsonl"
    raw.write_text(json.dumps({"question": "1+2?", "answer": "It is 3.\n#### 3"}))
    assert "all figures:" in shell.type("prepare", "gsm8k", raw, folder / "rows.jsonl")
    assert json.loads((folder / "rows.jsonl").read_text())["answer"] == "3"
    wrong = ["reward.function=nobody:judge", "megatron.learning_rate=1", "sglang.devise=cpu"]
    text = shell.type("doctor", config, *wrong, code=1)
    assert "reward.function = 'nobody:judge' cannot be loaded: ModuleNotFoundError" in text
    assert "did you mean megatron.lr?" in text and "did you mean sglang.device?" in text
    assert "3 problems: hooks, megatron settings, sglang settings" in text
    text = shell.type("plan", config, "--gpus", "4", "sglang.device=cuda")
    assert "best: trainer.data_parallel_size=1" in text
    large = ROOT / "configs" / "qwen3_32b_slurm.yaml"
    text = shell.type("slurm", large, "--plan", "--nodes", "8", "--gpus-per-node", "8")
    assert "sbatch --nodes=8" in text


def stop_before_the_first_step(shell: Shell, config: Path, run_dir: Path) -> None:
    """SIGTERM when there is nothing to save yet."""
    child = shell.start("run", config)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 0, ("training",), child)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=50)  # faults.shutdown_grace_s is 60
    assert child.returncode == 75 and "preempted" in output
    assert "Traceback" not in (run_dir / "logs" / "trainer.log").read_text()
    assert watch.left() == []
    (run_dir / "samples.jsonl").unlink()  # a batch may have been selected just before the signal


def kill(shell: Shell, config: Path, run_dir: Path) -> None:
    """SIGKILL: the status says that the run is dead, and how to continue."""
    child = shell.start("run", config)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, 1, child=child)
    child.kill()
    child.communicate(timeout=30)
    assert run_dir.with_name("run.1").is_dir()
    assert watch.left() == []
    text = shell.type("status", run_dir)
    assert "dead since" in text and "killed" in text and f"run {run_dir}/config.yaml" in text


def interrupt(shell: Shell, run_dir: Path) -> None:
    """Ctrl-C, after a resume, prints the reason of its wait. A joined reward worker ends too."""
    config = run_dir / "config.yaml"
    events = read_events(run_dir / JOURNAL_FILE)
    trained = max([1, *(event.version for event in events if isinstance(event, BatchTrained))])
    trained = max(trained, read_status(run_dir).version)  # the status of the killed run is there
    child = shell.start("run", config)
    watch = Descendants(child.pid)
    wait_for_version(run_dir, trained + 1, ("training",), child)
    assert "is in use by another run" in shell.type("run", config, code=2)
    joined = shell.start("join", run_dir, "reward-1")
    assert joined.stdout and "started reward-1 for the run" in joined.stdout.readline()
    child.send_signal(signal.SIGINT)
    signaled = time.monotonic()
    output, _ = child.communicate(timeout=40)
    assert child.returncode == 130 and "SIGINT: stopping controller, rollout-0" in output
    assert time.monotonic() - signaled < STOP_GRACE_S  # no process had to be killed
    assert watch.left() == []
    output, errors = joined.communicate(timeout=100)
    assert joined.returncode == 0 and "this host's part of the run is done" in output, errors
    assert "stopped at once" in shell.type("status", run_dir)
    samples = list(read_samples(run_dir))
    assert len(samples) >= 2 * 16
    assert {line.version - version for line in samples for version, _ in line.versions} == {0}


def look_after(shell: Shell, run_dir: Path, inputs: RunInputs, folder: Path) -> None:
    """The commands that show, check or use a run."""
    config = run_dir / "config.yaml"
    assert "lost=0 duplicated=0 max_staleness=0/0" in shell.type("audit", run_dir)
    assert re.match(r"\d+\.\d+", shell.type("tensorboard", run_dir, "--version_tb"))
    assert "does not exist" in shell.type("tensorboard", run_dir / "none", code=2)
    assert "25 tensors" in shell.type("plan-weights", config)

    batches.save(run_dir / "refused" / "v4-replica0.npz", 4, make_train_samples(16))
    figures = shell.type("replay", run_dir / "refused" / "v4-replica0.npz")
    [tokens] = re.findall(r"train/tokens (\S+)", figures)
    assert float(tokens) == sum(len(sample.ids) - 2 for sample in make_train_samples(16))
    layout = ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"]
    layout += ["megatron.pipeline_model_parallel_size=1", "trainer.data_parallel_size=2"]
    text = shell.type("selftest", config, *layout)
    assert "4 ranks" in text and re.search(r"(\d+) of \1 gradients agree", text)

    out = folder / "out"
    words: list[str | Path] = ["eval", config, "--run", run_dir, "--out", out]
    words += [f"evaluation.sets.held_out.path={inputs.eval}", "rollout.max_new_tokens=16"]
    assert re.search(r"held_out 6 ", shell.type(*words))
    result = json.loads((out / "evaluations" / "v0.json").read_text())
    assert Path(result["model"]).is_relative_to(run_dir / "weights")
    assert result["sets"]["held_out"]["metrics"]["problems"] == 6
    assert result["sets"]["held_out"]["interval"] in ("Wilson", "normal over problems")
    assert "held_out 6 " in shell.type(*words)  # complete: nothing is started


def end_of_run(shell: Shell, config: Path) -> tuple[str, str]:
    """Returns output and errors of a run that ends by itself with exit code 2."""
    child = shell.start("run", config)
    watch = Descendants(child.pid)
    output, errors = child.communicate(timeout=240)
    assert child.returncode == 2, output[-3000:] + errors[-3000:]
    assert watch.left() == []
    return output, errors


@needs_engine
@pytest.mark.parametrize("part", ["reward", "workflow"])
def test_function_that_always_raises_ends_the_run_with_its_traceback(
    part: str, shell: Shell, run_inputs: RunInputs, tmp_path: Path
) -> None:
    """The reward function also fails in the evaluation before training."""
    run_dir = tmp_path / "run"
    sections: dict[str, dict[str, dict[str, Any]]] = {
        "reward": {"reward": {"function": "loop_reward:broken"}},
        "workflow": {
            "run": {"steps": 5000, "mode": "rollout_only", "export_every": 0},
            "rollout": SHORT_ROLLOUT | {"workflow": "loop_workflow:Broken"},
            "evaluation": {"sets": {}},
        },
    }
    standard: dict[str, dict[str, Any]] = {
        "run": {"steps": 5000, "export_every": 0},
        "rollout": SHORT_ROLLOUT,
        "faults": {"max_failed_groups": 8},
        "megatron": {"tensor_model_parallel_size": 1},
    }
    output, errors = end_of_run(shell, run_inputs.config(run_dir, **standard | sections[part]))
    error, reason = {
        "reward": ("ValueError: no answer in the row", "reward_unavailable"),
        "workflow": ("ValueError: no tool in the row", "generation_failed"),
    }[part]
    assert "8 groups in a row could not be generated and scored" in errors
    assert error in errors and f"loop_{part}.py" in errors  # with its traceback
    assert re.search(rf"\b\d+ groups dropped \(\d+ {reason}\)", output)
    log = (run_dir / "logs" / "controller.log").read_text()
    assert log.count(error) < 20 and f"{error} (10 times so far)" in log
    text = shell.type("status", run_dir)
    assert "8 groups in a row could not be generated and scored" in text
    if part == "reward":
        assert "eval 0.0%" not in output
        assert "evaluation of version 0, held_out: no sample has a score" in log


@needs_engine
def test_run_in_which_no_group_passes_the_filters_ends_with_the_reason(
    shell: Shell, run_inputs: RunInputs, tmp_path: Path
) -> None:
    config = run_inputs.config(
        tmp_path / "run",
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT,
        reward={"function": "loop_reward:constant"},
        algorithm={
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "filters": {"drop_equal_rewards": True},
        },
        faults={"max_filtered_groups": 64},
        megatron={"tensor_model_parallel_size": 1},
    )
    output, errors = end_of_run(shell, config)
    found = "groups in a row (equal_rewards 100%; mean reward 1.000) and none passed"
    assert f"error: algorithm.filters dropped 64 {found}" in errors
    assert f"warning: algorithm.filters dropped 4 {found}; the run ends at 64" in output
    assert "dropped 4 groups in a row" in shell.type("status", tmp_path / "run")
