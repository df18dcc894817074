import asyncio
import base64
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT, python_environment
from run_log_builders import log_config, read_tensorboard, sample_of_versions, trained_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megatron_async_rl.controller import __main__ as controller_main
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability import health_page, run_log, sample_log
from megatron_async_rl.observability.run_log import RunLog
from megatron_async_rl.observability.sample_log import read_samples
from megatron_async_rl.observability.status import (
    EvaluationResult,
    RunStatus,
    ServerStatus,
    read_status,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample


def test_scalars_are_written_by_tag_and_version(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    log.write_scalars(3, {"train/loss": 0.25, "perf/time/train_s": 1.5})
    log.write_scalars(4, {"train/loss": 0.125})
    assert [(e.step, e.value) for e in read_tensorboard(tmp_path).Scalars("train/loss")] == [
        (3, 0.25),
        (4, 0.125),
    ]
    log.close()
    assert read_tensorboard(tmp_path).Scalars("perf/time/train_s")[0].value == 1.5


def test_staleness_counts_generated_tokens_only(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    log.write_samples(
        4, [trained_group(sample_of_versions((3, 12), (4, 8)), sample_of_versions((1, 5)))]
    )
    log.close()
    board = read_tensorboard(tmp_path)
    histogram = board.Histograms("staleness/per_token")[0].histogram_value
    bars = {
        limit - 0.5: count
        for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True)
        if count
    }
    assert bars == {0: 8, 1: 12, 3: 5}
    values = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert values["staleness/mean"] == pytest.approx((12 * 1 + 5 * 3) / 25)
    assert (values["staleness/min"], values["staleness/max"], values["staleness/limit"]) == (
        0,
        3,
        4,
    )
    assert (values["staleness/first_token"], values["staleness/last_token"]) == (2.0, 1.5)
    assert (values["rollout/interrupted_fraction"], values["rollout/versions_per_sample_mean"]) == (
        0.5,
        1.5,
    )
    assert board.Histograms("rollout/response_tokens")[0].histogram_value.max == 20


def test_histogram_keeps_every_value_of_a_wide_range(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    lengths = [1, 2, 20_000, 31_999]
    log.write_samples(0, [trained_group(*(sample_of_versions((0, length)) for length in lengths))])
    log.close()
    histogram = read_tensorboard(tmp_path).Histograms("rollout/response_tokens")[0].histogram_value
    assert sum(histogram.bucket) == 4 and len(histogram.bucket) <= 64
    assert histogram.bucket_limit[-1] > 31_999


def test_sample_text_shows_reward_and_version_changes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path, sample_texts=2))
    worst, best, other = (
        sample_of_versions((3, 1), text="worst"),
        sample_of_versions((3, 12), (4, 8), text="best ```"),
        sample_of_versions((3, 1)),
    )
    log.write_samples(4, [trained_group(worst, best, other, rewards=[-1.0, 2.0, 0.5])])
    log.close()
    board = read_tensorboard(tmp_path)
    texts = [board.Tensors(f"samples/{i}")[0].tensor_proto.string_val[0].decode() for i in (0, 1)]
    assert (
        "reward 2**" in texts[0]
        and "v3:12 tokens | v4:8 tokens" in texts[0]
        and "    best ```" in texts[0]
    )
    assert "reward -1**" in texts[1] and "worst" in texts[1]
    assert "samples/2" not in board.Tags()["tensors"]


def test_pages_of_charts_find_their_lines_in_runs_of_their_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    log.write_samples(1, [trained_group(sample_of_versions((0, 2)))])
    log.write_scalars(1, {"eval/first/accuracy": 0.5, "train/approx_kl": 0.1})
    log.write_scalars(1, {"eval/second/accuracy": 0.9, "train/reference_kl": 0.2})
    log.close()
    board = read_tensorboard(tmp_path)
    layout = layout_pb2.Layout.FromString(
        board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert [page.title for page in layout.category] == ["health", "time"]
    charts = {chart.title: chart.multiline.tag for page in layout.category for chart in page.chart}
    assert all(len(tags) == 1 for tags in charts.values())
    lines = {}
    for path in (tmp_path / "tensorboard").glob("line *"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            lines[path.name, tag] = events.Scalars(tag)[0].value
    [reward] = charts["reward: 1 trained, 2 all scored, 3 spread in a group, 4 evaluation"]
    assert {run: value for (run, tag), value in lines.items() if re.search(reward, tag)} == {
        "line 1": 1.0,
        "line 4": 0.5,  # of the first set
    }
    [kl] = charts["KL: 1 of the update, 2 from behavior, 3 from reference"]
    assert {run: value for (run, tag), value in lines.items() if re.search(kl, tag)} == {
        "line 1": pytest.approx(0.1),
        "line 3": pytest.approx(0.2),
    }
    assert all("health/" not in tag for tag in board.Tags()["scalars"])


def test_every_line_of_a_page_copies_a_defined_tag() -> None:
    defined = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    defined = [tag.replace("<kind>", "sampled") for tag in defined]
    for charts in health_page.PAGES.values():
        for chart, lines in charts.items():
            assert len(lines) <= health_page.MAX_LINES, chart
            for source in lines.values():
                with_placeholder = source.startswith(("sync/", "eval/"))
                assert source in defined or with_placeholder, source


def test_every_trained_sample_becomes_one_json_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    log.write_samples(
        4,
        [
            trained_group(
                sample_of_versions((3, 12), (4, 8)), sample_of_versions((4, 2)), rewards=[1.0, 0.0]
            )
        ],
    )
    first, second = (
        json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()
    )
    log.close()
    assert first == {
        "version": 4, "group_id": 5, "prompt_id": "p5", "index": 0, "reward": 1.0, "advantage": 0.5,
        "num_prompt": 3, "num_generated": 20, "versions": [[3, 12], [4, 8]],
        "stop": "stop", "num_interrupts": 1,
        "text": "1+1=2", "ids": first["ids"], "logprobs": first["logprobs"],
        "turns": [[3, 23]], "turn_rewards": [], "starts": [], "crc32": first["crc32"],
    }  # fmt: skip
    assert np.frombuffer(base64.b64decode(first["ids"]), "<i4").tolist() == [1, 2, 3] + [7] * 20
    assert np.frombuffer(base64.b64decode(first["logprobs"]), "<f4").tolist() == [-0.5] * 20
    assert (second["index"], second["reward"], second["versions"]) == (1, 0.0, [[4, 2]])
    line, _ = read_samples(tmp_path)
    assert line.ids.tolist() == [1, 2, 3] + [7] * 20 and line.logprobs.tolist() == [-0.5] * 20


def test_token_ids_are_logged_for_the_configured_count(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[], sample_tokens=3))
    group = trained_group(sample_of_versions((3, 12)), sample_of_versions((4, 2)))
    log.write_samples(4, [group, group])
    log.close()
    lines = list(read_samples(tmp_path))
    assert [len(line.ids) for line in lines] == [15, 5, 15, 0]
    assert [len(line.logprobs) for line in lines] == [12, 2, 12, 0]
    assert [(line.num_prompt, line.num_generated, line.versions) for line in lines[2:]] == [
        (3, 12, [[3, 12]]),
        (3, 2, [[4, 2]]),
    ]


def test_texts_of_a_long_run_can_be_bounded(tmp_path: Path) -> None:
    """samples.jsonl keeps the text of the first samples of a step, TensorBoard both ends."""
    log = RunLog(tmp_path, log_config(tmp_path, log_texts=1, sample_texts=2))
    half = run_log.HALF_TEXT
    text = "a" * half + "x" * 5000 + "b" * half
    samples = [sample_of_versions((3, 12), text=text) for _ in range(2)]
    log.write_samples(3, [trained_group(*samples)])
    log.close()
    assert [line.text for line in read_samples(tmp_path)] == [text, ""]
    board = read_tensorboard(tmp_path)
    for slot in range(2):
        [value] = board.Tensors(f"samples/{slot}")[0].tensor_proto.string_val
        assert value.count(b"a" * half) == value.count(b"b" * half) == 1
        assert b"[5,000 characters left out]" in value and b"xx" not in value


def test_tool_tokens_between_turns_belong_to_no_version(tmp_path: Path) -> None:
    versions = np.array([NOT_GENERATED, 2, 2, NOT_GENERATED, NOT_GENERATED, 3, 2], np.int32)
    sample = Sample(
        np.arange(7, dtype=np.int32), np.zeros(7, np.float32), versions, "length", "text"
    )
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    log.write_samples(3, [trained_group(sample)])
    log.close()
    (line,) = read_samples(tmp_path)
    assert (line.num_prompt, line.num_generated, line.versions) == (1, 4, [[2, 2], [3, 1], [2, 1]])


def test_sample_without_tokens_is_logged(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path))
    log.write_samples(1, [trained_group(sample_of_versions())])
    log.write_samples(2, [])
    log.close()
    assert [
        (line.num_prompt, line.num_generated, line.versions) for line in read_samples(tmp_path)
    ] == [(3, 0, [])]


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("whole_lines", [0, 2])
def test_truncated_line_is_the_only_one_lost(
    tmp_path: Path, whole_lines: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the file is read backwards, in blocks."""
    monkeypatch.setattr(sample_log, "BLOCK_BYTES", block_bytes)
    config = log_config(tmp_path, loggers=[])
    log = RunLog(tmp_path, config)
    log.write_samples(0, [trained_group(sample_of_versions((0, 1)))] * whole_lines)
    log.close()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"version": 0, "text": "' + "x" * 10_000)
    assert len(list(read_samples(tmp_path))) == whole_lines
    log = RunLog(tmp_path, config)
    log.write_samples(1, [trained_group(sample_of_versions((0, 1)))])
    log.close()
    assert [line.version for line in read_samples(tmp_path)] == [0] * whole_lines + [1]


def test_status_changes_while_a_controller_reads_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher kills a controller whose status.json keeps its modification time."""
    monkeypatch.setattr(controller_main, "TOUCH_S", 0.001)
    status = tmp_path / "status.json"
    status.write_text("{}")
    os.utime(status, (0, 0))
    with controller_main._shown_alive(status):
        deadline = time.monotonic() + 20
        while not status.stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.001)
    assert status.stat().st_mtime > 0


def test_status_of_an_earlier_start_is_not_made_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`join` takes a finished status that is newer than the keys for that of this start."""

    class Opened(Exception):
        pass

    def open_log(*_: object) -> None:
        raise Opened([thread.name for thread in threading.enumerate()])

    monkeypatch.setattr(controller_main, "RunLog", open_log)
    monkeypatch.setattr(controller_main.load, "load", lambda path: log_config(tmp_path))
    with pytest.raises(Opened) as opened:
        asyncio.run(controller_main._run(tmp_path))
    assert "alive" not in opened.value.args[0]


def test_status_is_read_back_unchanged(tmp_path: Path) -> None:
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    assert read_status(tmp_path).state == "starting" and read_status(tmp_path).steps == 10
    status = RunStatus(
        state="training", version=3, steps=10,
        ledger={"admitted": 4, "dropped.stale": 1}, reward_history=[0.5],
        fleet=[ServerStatus("rollout-0", "serving", 3, 8)],
        evals=[EvaluationResult(0, "aime", {"accuracy": 0.25})],
        pid=1, elapsed_s=2.0, staleness_max=1, staleness_worst=3,
    )  # fmt: skip
    log.write_status(status)
    log.close()
    read = read_status(tmp_path)
    status.updated_unix, status.host = read.updated_unix, read.host
    assert read == status and read.updated_unix > 2.0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    again = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    # of the whole run, over restarts
    assert again.staleness_worst == read_status(tmp_path).staleness_worst == 3
    again.close()


def test_status_of_a_long_run_stays_small_and_can_be_read(tmp_path: Path) -> None:
    """Rewards and results are of the whole course; a mean that overflows is no number in JSON."""
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    steps = 100_000
    results = [
        EvaluationResult(version, name, {"accuracy": 0.25, "reward_mean": math.inf})
        for version in range(0, steps, 10)
        for name in ("aime", "code")
    ]
    log.write_status(
        RunStatus(
            state="training",
            reward_history=[math.inf, *(step / steps for step in range(steps)), math.nan],
            evals=results,
        )
    )
    log.close()
    assert (tmp_path / "status.json").stat().st_size < 16_384
    read = read_status(tmp_path)
    assert read.state == "training" and 200 < len(read.reward_history) < 300
    assert (read.reward_history[0], read.reward_history[-1]) == (0.0, (steps - 1) / steps)
    assert read.reward_history == sorted(read.reward_history)
    versions = [result.version for result in read.evals if result.set == "code"]
    assert versions == [0, *range(steps - 80, steps, 10)]
    assert all(result.metrics == {"accuracy": 0.25} for result in read.evals)


def test_status_on_a_full_disk_is_written_in_place(tmp_path: Path) -> None:
    """The launcher kills a controller whose status does not change; its message names the disk."""
    log = RunLog(tmp_path, log_config(tmp_path, loggers=[]))
    path = tmp_path / "status.json"
    (tmp_path / "status.json.tmp").mkdir()  # nothing can be written there
    for message in ("the journal cannot be written: " + "x" * 900, "short"):
        os.utime(path, (1, 1))
        log.write_status(RunStatus(state="training", message=message))
        assert read_status(tmp_path).message == message and path.stat().st_mtime > 1
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match="No space left"):
        log.write_status(RunStatus(message="x" * 100_000))
    assert read_status(tmp_path).message == "short" and path.stat().st_mtime > 1
    path.unlink()
    with pytest.raises(IsADirectoryError):  # the reason, not that there is no file to overwrite
        log.write_status(RunStatus())
    log.close()


def test_folder_without_a_run_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no run at {tmp_path}"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "dancing"}')
    with pytest.raises(DataError, match="is damaged or of another version"):
        read_status(tmp_path)


def test_log_and_commands_load_no_torch_or_tensorflow(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from megatron_async_rl import __main__
from megatron_async_rl.cli import doctor
from megatron_async_rl.observability import terminal
doctor.checks(None)
assert "tensorboard" not in sys.modules, "reading the status must not load the writer"
from megatron_async_rl.observability.run_log import RunLog
from run_log_builders import log_config, sample_of_versions, trained_group
log = RunLog(Path({str(tmp_path)!r}), log_config(Path({str(tmp_path)!r})))
log.write_samples(1, [trained_group(sample_of_versions((0, 2)))])
log.close()
print(sorted({{"torch", "tensorflow", "megatron", "transformers"}} & set(sys.modules)))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=python_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def test_full_disk_leaves_no_partial_line(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from megatron_async_rl.observability.sample_log import append_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# a write beyond the limit is shortened, the next one fails
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with open(sys.argv[1], "ab", buffering=0) as file:
    append_whole(file, b"a" * 59 + b"\\n")
    try:
        append_whole(file, b"b" * 59 + b"\\n")
    except OSError:
        print("refused")
    append_whole(file, b"c" * 19 + b"\\n")
"""
    path = tmp_path / "samples.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "refused\n", done.stderr
    assert path.read_bytes() == b"a" * 59 + b"\n" + b"c" * 19 + b"\n"
