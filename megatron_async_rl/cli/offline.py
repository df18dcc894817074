"""`replay` and `selftest`: trainer ranks on this host without a controller or a fleet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher.roles import REPOSITORY
from megatron_async_rl.model.small_model import small_model


def replay(paths: list[Path], config_path: Path | None, overrides: list[str]) -> int:
    """Trains saved batches of one step. The configuration is the run's, beside the folder that they lie in."""
    if config_path is None:
        config_path = next(
            (
                p
                for p in (parent / "config.yaml" for parent in paths[0].resolve().parents)
                if p.exists()
            ),
            None,
        )
    if config_path is None:
        raise ConfigError(f"no config.yaml in a folder above {paths[0]}; name one with --config")
    config = configuration.load(config_path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        tree = msgspec.to_builtins(config)
        tree["run"]["dir"] = folder  # a step refused again leaves nothing behind
        return _torchrun(
            configuration.from_tree(tree),
            Path(folder),
            "replay",
            *(str(p.resolve()) for p in paths),
        )


def selftest(config: Config) -> int:
    """Compares this configuration's layout with TP1 PP1 CP1."""
    model = json.dumps(small_model(config))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model" / "config.json").write_text(model)
        return _torchrun(config, Path(folder), "selftest", str(Path(folder) / "model"))


def _torchrun(config: Config, folder: Path, module: str, *arguments: str) -> int:
    """Runs a module of the trainer on all ranks, with what it says on this terminal. Returns the first error's exit code."""
    (folder / "config.yaml").write_text(configuration.dump(config))
    command = [sys.executable, "-m", "megatron_async_rl.trainer.torchrun", "--no-python"]
    command += [
        "--rdzv-backend=file",
        f"--rdzv-endpoint={folder / 'rank-stores'}",
        f"--nproc-per-node={config.trainer_ranks}",
        sys.executable,
        "-m",
        f"megatron_async_rl.trainer.{module}",
    ]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(config.trainer.cpu_threads),
    }
    done = subprocess.run(
        [*command, str(folder / "config.yaml"), *arguments],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = dict.fromkeys(line for line in done.stderr.splitlines() if line.startswith("error: "))
    sys.stderr.write("\n".join(errors) + "\n" if errors else done.stderr if done.returncode else "")
    return done.returncode
