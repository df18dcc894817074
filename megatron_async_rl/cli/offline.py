"""`replay` and `selftest`: run trainer ranks on this host without a controller or rollout
workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec

from megatron_async_rl import processes
from megatron_async_rl.cli import hook_checks
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.algorithm_checks import check_trained_distribution
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher import torchrun
from megatron_async_rl.model.small_model import small_model


def replay(paths: list[Path], config_path: Path | None, overrides: list[str]) -> int:
    """Trains the saved batch of one step.

    Without `config_path` the configuration is the config.yaml in the nearest folder above the
    batch.
    """
    if config_path is None:
        candidates = (parent / "config.yaml" for parent in paths[0].resolve().parents)
        config_path = next((path for path in candidates if path.exists()), None)
    if config_path is None:
        raise ConfigError(f"no config.yaml in a folder above {paths[0]}", "name one with --config")
    sampled = configuration.load(config_path, overrides)
    check_trained_distribution(sampled)
    tree = msgspec.to_builtins(sampled)
    with processes.temporary_folder() as folder:
        tree["run"]["dir"] = str(folder)  # a step that fails again keeps its batch here
        config = configuration.from_tree(tree)
        return run_ranks(config, folder, "replay", *(str(path.resolve()) for path in paths))


def selftest(config: Config) -> int:
    """Checks the hooks, then compares the layout with TP1 PP1 CP1, on a small model."""
    passed = hook_checks.check_hooks(config, lambda line: print(line, flush=True))
    model = json.dumps(small_model(config))
    with processes.temporary_folder() as folder:
        model_dir = folder / "model"
        model_dir.mkdir()
        (model_dir / "config.json").write_text(model)
        return run_ranks(config, folder, "selftest", str(model_dir)) or int(not passed)


def run_ranks(config: Config, folder: Path, module: str, *arguments: str) -> int:
    """Runs a module of trainer/ on all ranks; prints their errors, returns torchrun's exit code."""
    path = folder / "config.yaml"
    path.write_text(configuration.dump(config))
    rendezvous = torchrun.file_rendezvous(folder / "rank-stores")
    module = f"megatron_async_rl.trainer.{module}"
    command = torchrun.command(config.trainer_ranks, rendezvous, module, str(path), *arguments)
    env = os.environ | {
        "PYTHONPATH": processes.python_path(),
        "OMP_NUM_THREADS": str(config.trainer.cpu_threads),
        **processes.temporary_environment(folder),
    }
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    errors = dict.fromkeys(re.findall(r"^error: .*(?:\n  .*)*", done.stderr, re.MULTILINE))
    if errors:
        sys.stderr.write("\n".join(errors) + "\n")
    elif done.returncode:
        sys.stderr.write(done.stderr)
    return done.returncode
