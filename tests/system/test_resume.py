"""A run is killed twice: first one trainer rank, then all processes at once.

The steps after the last checkpoint are trained again with bit-identical results.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from needs import needs_engine
from tiny_model import make_dataset, make_model
from whole_runs import RunInputs, assert_no_process_left, start_run, wait_for_version

from megatron_async_rl.cli import audit
from megatron_async_rl.config import load
from megatron_async_rl.controller.journal.events import GroupAdmitted
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.data.dataset import read_training
from megatron_async_rl.data.order import PromptStream
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.observability.status import read_status
from megatron_async_rl.storage import checkpoints

pytestmark = needs_engine
STEPS, EVERY = 14, 4


def digests(run_dir: Path) -> dict[int, str]:
    """Returns version -> digest of the exported weights, for each complete export."""
    found = {}
    for folder in run_dir.glob("policy-v*"):
        files = sorted(folder.glob("*.safetensors"))
        if files and (folder / "config.json").exists():
            found[int(folder.name.removeprefix("policy-v"))] = hashlib.sha256(
                b"".join(file.read_bytes() for file in files)
            ).hexdigest()
    return found


def some_rank(launcher: int) -> psutil.Process:
    """Returns a trainer rank, which runs as long as this process's torchrun."""
    module = "megatron_async_rl.trainer"
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            words = process.cmdline()
            if module in words and f"{module}.torchrun" not in words:
                return process
    raise AssertionError("no trainer rank")


def test_run_killed_twice_ends_like_an_undisturbed_run(tmp_path: Path) -> None:
    inputs = RunInputs(
        make_model(tmp_path / "model"),
        make_dataset(tmp_path / "train.jsonl", 60),
        make_dataset(tmp_path / "eval.jsonl", 4, 100),
    )
    run_dir = tmp_path / "run"
    rows = [{"question": f"{n}*2=", "solution": str(2 * n)} for n in range(10, 40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "more.parquet")
    fields = {"prompt": "question", "answer": "solution"}
    sources = [
        {"path": str(inputs.train), "weight": 2.0},
        {"path": str(tmp_path / "more.parquet"), "fields": fields},
    ]
    path = inputs.config(
        run_dir,
        run={"steps": STEPS},
        data={"train": sources},
        rollout={"max_new_tokens": 48, "max_concurrent_samples": 8},
        checkpoint={"every": EVERY},
        faults={"restart_backoff_s": 0.1},
        evaluation={"sets": {}},
    )
    child = start_run(path)
    wait_for_version(run_dir, EVERY + 1, child=child)
    rank = some_rank(child.pid)
    while True:  # until there are steps after the last checkpoint; its version has no successor yet
        rank.suspend()
        version, saved = read_status(run_dir).version, checkpoints.list_manifests(run_dir)
        if saved and version > saved[0].version and version % EVERY:
            break
        rank.resume()
        assert child.poll() is None
        time.sleep(0.05)
    rank.kill()
    time.sleep(1)
    before = digests(run_dir)
    killed_at = read_status(run_dir).version
    wait_for_version(run_dir, killed_at + 3, child=child)

    os.kill(child.pid, signal.SIGKILL)  # the kernel then ends every process of the run
    child.communicate()
    assert_no_process_left(run_dir)
    between = digests(run_dir)
    log = (run_dir / "logs" / "controller.log").read_text()
    assert "the trainer repeated the step to version" in log  # some steps were repeated
    assert all(
        between[version] == digest for version, digest in before.items()
    )  # with bit-identical weights

    child = start_run(path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-2000:] + errors[-2000:]
    assert "resuming the run" in output
    after = digests(run_dir)
    assert all(after[version] == digest for version, digest in between.items())

    status = read_status(run_dir)
    assert (status.state, status.version) == ("finished", STEPS)
    result = audit.audit(run_dir, load.load(run_dir / "config.yaml").staleness.max_staleness)
    assert result.breaches == [] and result.lost == result.duplicated == 0
    assert result.epochs == 2 and result.trained == 4 * STEPS

    settings = load.load(run_dir / "config.yaml")
    prompts = read_training(settings, Tokenizer(settings.model.path))
    stream = PromptStream(prompts, settings.run.seed)
    admitted = [
        fact.prompt_id
        for fact in read_events(run_dir / JOURNAL_FILE)
        if isinstance(fact, GroupAdmitted)
    ]
    assert admitted == [
        stream.next().prompt_id for _ in admitted
    ]  # in the order of an undisturbed run
    first = sum(prompt_id.startswith("0:") for prompt_id in admitted)
    assert abs(first - 2 / 3 * len(admitted)) < 1  # each source has its share

    again = start_run(path)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "is complete" in output
