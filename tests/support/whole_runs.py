"""TODO."""

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
from paths import ROOT, SUPPORT
from tiny_model import CPU_ENGINE, make_dataset, make_model

from megatron_async_rl import processes
from megatron_async_rl.config import load
from megatron_async_rl.observability.sample_log import SampleLine, read_samples
from megatron_async_rl.observability.status import RunStatus, read_status

RUN_STEPS, RUN_MAX_STALENESS = 6, 3


@dataclass
class RunInputs:
    model: Path
    train: Path
    eval: Path

    def config(self, run_dir: Path, **sections: dict[str, Any]) -> Path:
        """A YAML for a run into `run_dir`; `sections` change its standard settings."""
        standard: dict[str, dict[str, Any]] = {
            "run": {"dir": str(run_dir), "steps": RUN_STEPS, "seed": 3, "export_every": 1},
            "model": {"path": str(self.model), "context_tokens": 128},
            "data": {"train": str(self.train), "eval": str(self.eval)},
            # one group at a time: generation is what takes long, so that updates meet it in flight on any machine
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
        path.write_text(yaml.safe_dump(tree))
        return path


def make_run_inputs(folder: Path) -> RunInputs:
    return RunInputs(
        make_model(folder / "model"),
        make_dataset(folder / "train.jsonl", 60),
        make_dataset(folder / "eval.jsonl", 6, 100),
    )


def start_run(path: Path) -> subprocess.Popen[str]:
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


def processes_of_run(run_dir: Path) -> list[psutil.Process]:
    """Whoever has the run's folder on its command line, and their descendants."""
    mine = [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(str(run_dir) in a for a in p.info["cmdline"] or [])
    ]
    return [p for p in mine if p.pid != os.getpid()]


def assert_no_process_left(run_dir: Path) -> None:
    deadline = time.monotonic() + 10
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
    from transformers import AutoModelForCausalLM

    settings = load.load(run_dir / "config.yaml")
    folder = Path(settings.model.path) if version == 0 else run_dir / f"policy-v{version}"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def fresh_logprobs(run_dir: Path, version: int, line: SampleLine) -> np.ndarray:
    """[num_generated]: logprob of each generated token of all turns, by one prefill under the weights of `version`."""
    import torch

    ids = torch.tensor(line.ids, dtype=torch.long)
    with torch.no_grad():
        logits = load_policy(run_dir, version)(input_ids=ids[None]).logits[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
    return np.concatenate([logprobs[start - 1 : end - 1] for start, end in line.turns])


START_TIMEOUT_S = 240


def wait_for_version(
    run_dir: Path, version: int, states: tuple[str, ...] = ("training", "finished")
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    path = run_dir / "status.json"
    while True:
        status = json.loads(path.read_text()) if path.exists() else {"version": -1, "state": ""}
        if status["version"] >= version and status["state"] in states:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
