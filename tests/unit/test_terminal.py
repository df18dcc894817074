import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from run_log_builders import log_config

from megatron_async_rl.__main__ import main
from megatron_async_rl.observability import panel, terminal
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.status import (
    EvaluationResult,
    RunState,
    RunStatus,
    ServerStatus,
    find_status,
)


def make_status(**changes: object) -> RunStatus:
    status = RunStatus(
        state="training",
        pid=77,
        updated_unix=1252.0,
        elapsed_s=252.0,
        version=37,
        steps=60,
        eta_s=72.0,
        reward_mean=0.71,
        reward_history=[0.3, 0.4, 0.5, 0.7],
        generate_tokens_per_s=12345.2,
        train_tokens_per_s=8910.0,
        staleness_mean=0.83,
        staleness_max=2,
        staleness_worst=3,
        staleness_limit=4,
        update_s=0.113,
        update_fraction=0.006,
        step_s=4.21,
        mfu=0.523,
        trainer_memory_gib=71.34,
        train_wait_fraction=0.03,
        ledger={
            "admitted": 1220,
            "trained": 1184,
            "dropped.stale": 2,
            "dropped.reward_unavailable": 1,
            "pending": 33,
        },
        fleet=[
            ServerStatus("rollout-0", "serving", 37, 61, 3, 0.87, 0.42, 5123.0),
            ServerStatus("rollout-1", "updating", 36, 64),
        ],
        evals=[
            EvaluationResult(version, "aime", {"accuracy": accuracy, "problems": 256.0})
            for version, accuracy in ((0, 0.312), (20, 0.5), (37, 0.655))
        ],
        interrupted_samples=214,
    )
    for name, value in changes.items():
        setattr(status, name, value)
    return status


def draw(status: RunStatus, width: int = 80, now_unix: float = 1253.0) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(panel.render(status, now_unix))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100])
def test_panel_shows_the_main_figures_and_fits(width: int) -> None:
    text = draw(make_status(), width)
    assert all(len(row) <= width for row in text.splitlines())
    for part in (
        "training", "37/60", "4:12 elapsed, 1:12 left", "0.710", "▁", "█", "12,345 generated",
        "8,910 trained", "mean 0.83   max 2   worst so far 3 of 4", "0.11 s", "0.6% of the time",
        "waited for samples 3%", "rollout-1  updating", "87%   42%  5,123",
        "peak memory 71.3 GiB   MFU 52.3%",
        "aime  31.2% (v0) -> 50.0% (v20) -> 65.5% (v37)",
        "1,220 admitted = 1,184 trained + 33 pending + 3 dropped",
    ):  # fmt: skip
        assert part in text


def test_panel_of_a_starting_run_can_be_drawn() -> None:
    assert "starting" in draw(RunStatus())


def test_unbalanced_ledger_is_shown() -> None:
    assert "!=" in draw(make_status(ledger={"admitted": 3, "trained": 1, "pending": 1}))


def test_large_fleet_is_counted_instead_of_listed() -> None:
    fleet = [
        ServerStatus(f"rollout-{i}", "updating" if i < 8 else "serving", 36 if i < 8 else 37, 64)
        for i in range(64)
    ]
    text = draw(make_status(fleet=fleet), width=100)
    assert "64 servers, 4,096 samples running:  56 serving v37   8 updating v36" in text
    assert "rollout-9" not in text


def test_silent_run_is_marked_and_an_ended_one_is_not() -> None:
    assert "no update for 2:28: is process 77 alive?" in draw(make_status(), now_unix=1400.0)
    assert "no update" not in draw(make_status(state="finished"), now_unix=1400.0)


def test_summary_gives_evaluation_before_and_after() -> None:
    text = panel.summary(make_status(state="finished", version=60))
    assert text.splitlines()[0] == "finished after 60 of 60 steps in 4:12"
    assert "aime: 31.2% before (v0)  ->  65.5% after (v37), on 256 problems" in text
    assert (
        "max 2 in the last step, 3 in the whole run, limit 4; "
        "214 samples resumed under newer weights" in text
    )


def test_running_evaluation_is_shown() -> None:
    status = make_status(evaluating="version 20, on rollout-1: 12 of 60 samples")
    assert "running: version 20, on rollout-1: 12 of 60 samples" in draw(status, 100)
    line = panel.log_line(status)
    assert "evaluating version 20, on rollout-1: 12 of 60 samples" in line
    assert "eval aime 65.5% (v37), 256 problems" in line


def test_summary_of_a_failed_run_gives_the_reason() -> None:
    text = panel.summary(
        RunStatus(state="failed", message="server rollout-0 did not start", steps=60)
    )
    assert "failed after 0 of 60 steps" in text and "server rollout-0 did not start" in text


def test_without_terminal_each_version_and_state_is_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    stop, out = threading.Event(), io.StringIO()
    follower = threading.Thread(
        target=terminal.follow, args=(tmp_path, stop.is_set, Console(file=out, width=40))
    )
    follower.start()
    for version in (1, 2):
        log.write_status(make_status(version=version))
        while f"step {version}/60" not in out.getvalue():
            time.sleep(0.02)
        # no change that deserves a line
        log.write_status(make_status(version=version, reward_mean=0.5))
        time.sleep(1.5 * terminal.POLL_S)
    log.write_status(make_status(state="finished", version=60))
    stop.set()
    follower.join()
    log.close()
    lines = out.getvalue().splitlines()
    assert [
        line.partition(" | reward")[0] for line in lines if not line.startswith("starting")
    ] == [
        "training | step 1/60",
        "training | step 2/60",
        "finished | step 60/60",
    ]


def test_line_of_a_failed_run_counts_the_dropped_groups() -> None:
    line = panel.log_line(make_status(state="failed", message="all groups failed"))
    assert line == "failed | 3 groups dropped (2 stale, 1 reward_unavailable): all groups failed"
    failed = make_status(state="failed", message="the last error:\nx\n  File", ledger={})
    assert panel.log_line(failed) == "failed: the last error: x"


def test_slow_start_prints_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_LINE_S", 0.2)
    monkeypatch.setattr(terminal, "POLL_S", 0.05)
    out = io.StringIO()
    terminal.follow(tmp_path, lambda: out.getvalue().count("\n") >= 3, Console(file=out))
    lines = out.getvalue().splitlines()
    assert all(line.startswith("starting | waiting for the controller") for line in lines)


@pytest.mark.parametrize("state", ["finished", "training"])  # ended, or killed
def test_status_of_an_earlier_start_is_not_shown(tmp_path: Path, state: RunState) -> None:
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    log.write_status(make_status(state=state, version=7))
    log.close()
    out, previous = io.StringIO(), find_status(tmp_path)
    terminal.follow(tmp_path, lambda: True, Console(file=out), previous)
    assert out.getvalue().startswith("starting | waiting for the controller")
    RunLog(tmp_path, config).close()  # of the restarted controller
    out = io.StringIO()
    terminal.follow(tmp_path, lambda: True, Console(file=out), previous)
    assert out.getvalue().startswith("starting | step 7/")


def test_terminal_shows_the_panel(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    log.write_status(make_status())
    log.close()
    out = io.StringIO()
    terminal.follow(tmp_path, lambda: True, Console(file=out, force_terminal=True, width=80))
    assert "37/60" in out.getvalue() and "rollout-1" in out.getvalue()


def test_screenshot_is_an_svg_of_the_panel() -> None:
    svg = panel.screenshot_svg(make_status())
    assert svg.startswith("<svg") and "37/60" in svg and "is&#160;process" not in svg


def test_status_prints_panel_and_ledger_or_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no run at {tmp_path}")
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    log.write_status(make_status())
    log.close()
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "37/60" in out and "dropped.reward_unavailable" in out


def test_package_error_ends_a_command_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the configuration")
