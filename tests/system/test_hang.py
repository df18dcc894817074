"""A server with a hanging scheduler and an answering HTTP side is detected and replaced."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from descendants import Descendants
from needs import needs_engine
from whole_runs import (
    SHORT_ROLLOUT,
    START_TIMEOUT_S,
    make_run_inputs,
    start_run,
    wait_for_version,
)

from megatron_async_rl.observability.status import read_status


@needs_engine
def test_hung_server_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = make_run_inputs(tmp_path).config(
        run_dir,
        run={"steps": 5000, "export_every": 0},
        evaluation={"sets": {}},
        rollout=SHORT_ROLLOUT | {"lease_timeout_s": 4.0, "request_timeout_s": 10.0},
        weights={"update_timeout_s": 8.0},
        faults={"restart_backoff_s": 0.1},
        megatron={"tensor_model_parallel_size": 1},
    )
    child = start_run(path)
    watch = Descendants(child.pid)
    log = run_dir / "logs" / "controller.log"
    try:
        wait_for_version(run_dir, 1, child=child)
        deadline = time.monotonic() + START_TIMEOUT_S
        ours = {p.pid for p in watch.look()}
        named = psutil.process_iter(["cmdline"])
        schedulers = [
            p.pid
            for p in named
            if p.pid in ours and "sglang::scheduler" in " ".join(p.info["cmdline"] or [])
        ]
        assert schedulers
        for pid in schedulers:
            os.kill(pid, signal.SIGSTOP)
        at = read_status(run_dir).version
        while not (words := log.read_text()).count("rollout-0 joined") > 1:
            assert time.monotonic() < deadline, words
            time.sleep(0.1)
        # detected by a probe, or by the timeout of an update
        assert "the SGLang server hangs" in words or "within weights.update_timeout_s" in words
        wait_for_version(run_dir, at + 8, child=child)  # more batches than were buffered
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=120)
    assert child.returncode == 130
    assert watch.left() == []
