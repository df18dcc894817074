"""Every command of README.md and docs/ runs as typed, with nothing but a shell's environment."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from run_log_builders import log_config, sample_of_versions, trained_group

from megatron_async_rl.__main__ import _parser
from megatron_async_rl.observability.run_log import RunLog

SCRIPT = "launchers/megatron-async-rl"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED = re.compile(rf"^[^\n#|]*?{SCRIPT} ([^`#\n]+(?:\n[^`#\n]+(?=`))?)", re.MULTILINE)
NAMES = "run eval join slurm doctor status tensorboard audit plan-weights selftest replay".split()


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


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with the environment of a fresh login."""
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.run(
        [ROOT / SCRIPT, *arguments],
        env=environment | variables,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def with_this_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return shell(*arguments, MEGATRON_ASYNC_RL_PYTHON=sys.executable)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    log = RunLog(folder, log_config(folder))
    log.write_samples(0, [trained_group(sample_of_versions((0, 3)))])
    log.close()
    return folder


def test_every_command_is_documented_in_the_readme() -> None:
    documented = {command.split()[0] for command in commands(ROOT / "README.md")}
    assert documented == set(NAMES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_accepted(page: Path) -> None:
    for command in commands(page):
        _, rest = _parser().parse_known_args(as_arguments(command))
        assert not [word for word in rest if "=" not in word], command


def test_documents_use_one_form() -> None:
    other = re.compile(r"python3? -m megatron_async_rl(?![.\w])|tensorboard --logdir")
    assert [page.name for page in PAGES if other.search(page.read_text())] == []


@pytest.mark.parametrize("name", NAMES)
def test_command_explains_itself(name: str) -> None:
    done = with_this_python(name, "--help")
    assert done.returncode == 0 and f"{SCRIPT} {name}" in done.stdout, done.stderr


def test_doctor_runs() -> None:
    assert "megatron-core" in with_this_python("doctor").stdout


def test_placement_is_printed() -> None:
    config = ROOT / "configs" / "qwen3_32b_slurm.yaml"
    done = with_this_python("slurm", str(config), "--plan", "--nodes", "8", "--gpus-per-node", "8")
    assert done.returncode == 0 and "sbatch --nodes=8" in done.stdout, done.stderr


def test_status_of_a_run_folder_is_shown(run_dir: Path) -> None:
    done = with_this_python("status", str(run_dir))
    assert done.returncode == 0 and "megatron_async_rl" in done.stdout, done.stderr


def test_tensorboard_of_the_environment_is_started(run_dir: Path) -> None:
    done = with_this_python("tensorboard", str(run_dir), "--version_tb")
    assert done.returncode == 0 and re.match(r"\d+\.\d+", done.stdout), done.stderr
    missing = with_this_python("tensorboard", str(run_dir / "none"))
    assert missing.returncode == 2 and "does not exist" in missing.stderr


@pytest.mark.skipif(
    not Path(sys.prefix, ".complete").exists(), reason="not the Python of tools/setup_env.sh"
)
def test_environment_is_found_without_a_variable() -> None:
    variables = {n: os.environ[n] for n in os.environ if n in ("MEGATRON_ASYNC_RL_CACHE",)}
    done = shell("--version", **variables)
    assert done.stdout.startswith("megatron_async_rl "), done.stderr


def test_links_to_the_script_work(tmp_path: Path) -> None:
    (tmp_path / "marl").symlink_to(ROOT / SCRIPT)
    done = subprocess.run(
        [tmp_path / "marl", "--version"],
        env=os.environ | {"MEGATRON_ASYNC_RL_PYTHON": sys.executable, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("megatron_async_rl "), done.stderr
