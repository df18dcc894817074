"""Whole runs of a tiny model: inputs, configuration, the launcher, samples and logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from paths import python_environment
from tiny_model import CPU_ENGINE, make_dataset, make_model

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.observability.sample_log import SampleLine, read_samples
from megatron_async_rl.observability.status import RunStatus, read_status

RUN_STEPS, RUN_MAX_STALENESS = 6, 3
# `rollout:` of runs in which no update has to interrupt a request: a batch takes 0.2 s instead of 2
SHORT_ROLLOUT = {"max_new_tokens": 12, "max_concurrent_samples": 16}


@dataclass
class RunInputs:
    model: Path
    train: Path
    eval: Path

    def config(self, run_dir: Path, **sections: dict[str, Any]) -> Path:
        """Writes the YAML of a run into `run_dir`; `sections` change the standard settings."""
        standard: dict[str, dict[str, Any]] = {
            "run": {"dir": str(run_dir), "steps": RUN_STEPS, "seed": 3, "export_every": 1},
            "model": {"path": str(self.model), "context_tokens": 128},
            "data": {"train": str(self.train)},
            "evaluation": {"sets": {"held_out": {"path": str(self.eval)}}},
            # One group at a time makes generation the slowest part, so that weight updates
            # interrupt requests on any machine.
            "rollout": {"max_new_tokens": 96, "max_concurrent_samples": 4},
            "staleness": {"max_staleness": RUN_MAX_STALENESS},
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
        whole = path.with_suffix(".new")  # a requeued job may read the configuration at any time
        whole.write_text(yaml.safe_dump(tree))
        return whole.replace(path)


def make_run_inputs(folder: Path) -> RunInputs:
    return RunInputs(
        make_model(folder / "model"),
        make_dataset(folder / "train.jsonl", 60),
        make_dataset(folder / "eval.jsonl", 6, 100),
    )


def start_run(path: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_async_rl", "run", str(path), *options],
        env=python_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=processes.die_with_parent,  # ends with pytest, even if that is killed
    )


def processes_of_run(run_dir: Path) -> list[psutil.Process]:
    """Returns the processes with the run's folder on their command line, but for this one."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid()
        and any(str(run_dir) in word for word in process.info["cmdline"] or [])
    ]


def assert_no_process_left(run_dir: Path) -> None:
    deadline = time.monotonic() + 30
    while (left := processes_of_run(run_dir)) and time.monotonic() < deadline:
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
    def status(self) -> RunStatus:
        return read_status(self.folder)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()


@lru_cache
def load_policy(run_dir: Path, version: int) -> Any:
    """Returns the transformers model of a version: the run exports every one."""
    from transformers import AutoModelForCausalLM

    settings = load.load(run_dir / "config.yaml")
    folder = Path(settings.model.path) if version == 0 else run_dir / f"policy-v{version}"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def fresh_logprobs(run_dir: Path, version: int, line: SampleLine) -> np.ndarray:
    """Returns [num_generated]: logprobs by one prefill of transformers under these weights.

    They are of the generated tokens of all turns.
    """
    import torch

    ids = torch.tensor(line.ids, dtype=torch.long)
    with torch.no_grad():
        logits = load_policy(run_dir, version)(input_ids=ids[None]).logits[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
    return np.concatenate([logprobs[start - 1 : end - 1] for start, end in sorted(line.turns)])


START_TIMEOUT_S = 240


def wait_for_version(
    run_dir: Path,
    version: int,
    states: tuple[str, ...] = ("training", "finished"),
    child: subprocess.Popen[str] | None = None,
) -> None:
    """Waits until the status shows the version and one of the states; `child` must not end."""
    deadline = time.monotonic() + START_TIMEOUT_S
    path = run_dir / "status.json"
    while True:
        status = json.loads(path.read_text()) if path.exists() else {"version": -1, "state": ""}
        if status["version"] >= version and status["state"] in states:
            return
        assert child is None or child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
