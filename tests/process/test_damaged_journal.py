"""`run` with a damaged journal ends at once: one error, exit code 2, no second controller."""

from __future__ import annotations

from pathlib import Path

import msgspec
from journal_builders import write_run_folder
from needs import needs_engine
from whole_runs import assert_no_process_left, make_run_inputs, start_run

from megatron_async_rl.config import load as configuration
from megatron_async_rl.data.digests import record_data
from megatron_async_rl.launcher import roles
from megatron_async_rl.observability.status import STATUS_FILE, RunStatus

pytestmark = needs_engine


def test_run_with_a_damaged_journal_ends_at_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run_folder(run_dir, keep_wal=False)
    path = make_run_inputs(tmp_path).config(run_dir)
    config = configuration.load(path)
    (run_dir / "config.yaml").write_text(configuration.dump(config))
    record_data(run_dir, config)
    # the launcher restarts a controller that crashes during training
    status = RunStatus(state="training", version=3, steps=config.run.steps)
    (run_dir / STATUS_FILE).write_bytes(msgspec.json.encode(status))
    journal = run_dir / "journal.sqlite"
    data = bytearray(journal.read_bytes())
    data[4096:8192] = bytes(4096)  # a page
    journal.write_bytes(data)
    others = [name for name in roles.names(config) if name != "controller"]
    child = start_run(path, "--elsewhere", ",".join(others))
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 2, output + errors
    [first, *rest] = errors.splitlines()
    assert first.startswith(f"error: {journal} is damaged: ") and "--from-scratch" in first
    assert len(rest) == 1 and "(controller ended the run; its log: " in rest[0]
    assert "restart" not in output
    assert (run_dir / "logs" / "controller.log").read_text().count("error: ") == 1
    assert_no_process_left(run_dir)
