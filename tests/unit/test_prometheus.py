"""The Prometheus endpoint: its text format, where it listens, and that no client holds it up."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_builders import config_tree

from megatron_async_rl.addresses import free_port
from megatron_async_rl.config import load as configuration
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.observability import prometheus
from megatron_async_rl.observability.prometheus import Prometheus
from megatron_async_rl.observability.run_log import RunLog

# of the format's grammar: a name, then a value as Go's ParseFloat reads it
NUMBER = r"NaN|[+-]Inf|-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*) ({NUMBER})")


@pytest.fixture
def endpoint() -> Iterator[Prometheus]:
    opened = Prometheus("127.0.0.1", free_port())
    yield opened
    opened.close()


def fetch(port: int, path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as reply:
        return reply.read().decode(), reply.headers["Content-Type"]


def parse(text: str) -> dict[str, float]:
    """Reads the text format strictly: each sample after its own TYPE line, each name once."""
    assert text.endswith("\n")
    lines, found = text.splitlines(), {}
    for kind, sample in zip(lines[::2], lines[1::2], strict=True):
        match = SAMPLE.fullmatch(sample)
        assert match and kind == f"# TYPE {match[1]} gauge" and match[1] not in found, sample
        found[match[1]] = float(match[2])
    return found


def test_newest_value_of_each_tag_is_served(endpoint: Prometheus) -> None:
    endpoint.scalars(3, {"train/loss": 0.5, "eval/aime-24/pass_at_2": 1.0})
    endpoint.scalars(4, {"train/loss": 1e-9, "train/lr": -0.25})
    text, kind = fetch(endpoint.port)
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert parse(text) == {
        "megatron_async_rl_version": 4.0,
        "megatron_async_rl_train_loss": 1e-9,
        "megatron_async_rl_train_lr": -0.25,
        "megatron_async_rl_eval_aime_24_pass_at_2": 1.0,
    }


def test_values_that_are_no_numbers_have_the_names_of_the_format() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300, "e": 0.0}
    found = parse(prometheus.exposition(values))
    assert math.isnan(found.pop("megatron_async_rl_a"))
    assert found == {f"megatron_async_rl_{tag}": values[tag] for tag in "bcde"}


def test_tags_of_the_same_name_are_told_apart_by_a_label() -> None:
    text = prometheus.exposition({"user/a.b": 1.0, "user/a-b": 2.0, "user/c": 3.0})
    assert text.splitlines() == [
        "# TYPE megatron_async_rl_user_a_b gauge",
        'megatron_async_rl_user_a_b{tag="user/a-b"} 2.0',
        'megatron_async_rl_user_a_b{tag="user/a.b"} 1.0',
        "# TYPE megatron_async_rl_user_c gauge",
        "megatron_async_rl_user_c 3.0",
    ]


def test_other_paths_are_not_found(endpoint: Prometheus) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(endpoint.port, "/")


@pytest.mark.parametrize("byte", [b"", b"x"])
def test_silent_or_slow_client_is_cut_off(
    endpoint: Prometheus, monkeypatch: pytest.MonkeyPatch, byte: bytes
) -> None:
    monkeypatch.setattr(prometheus, "CLIENT_S", 0.2)
    endpoint.scalars(1, {"train/loss": 0.5})
    answered = threading.Event()

    def send_slowly(client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was cut off
            while not answered.wait(0.05):
                client.sendall(byte)

    with socket.create_connection(("127.0.0.1", endpoint.port)) as client:
        sender = threading.Thread(target=send_slowly, args=[client])
        sender.start()
        try:
            assert "train_loss 0.5" in fetch(endpoint.port)[0]
        finally:
            answered.set()
            sender.join()


def test_port_in_use_is_named(endpoint: Prometheus) -> None:
    with pytest.raises(ConfigError, match=f"monitor.prometheus_port = {endpoint.port}"):
        Prometheus("127.0.0.1", endpoint.port)


def test_run_serves_its_scalars_if_the_port_is_set(tmp_path: Path) -> None:
    port = free_port()
    monitor = {"loggers": [], "prometheus_port": port}
    run = {"dir": str(tmp_path), "steps": 8}
    config = configuration.from_tree(config_tree(run=run, monitor=monitor))
    log = RunLog(tmp_path, config)
    log.write_scalars(7, {"perf/mfu": 0.5})
    assert parse(fetch(port)[0])["megatron_async_rl_perf_mfu"] == 0.5
    log.close()
    with pytest.raises(OSError):
        fetch(port)
