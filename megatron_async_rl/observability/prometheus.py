"""Serves the newest scalars to Prometheus, with `monitor.prometheus_port`.

One request at a time, in a thread of its own: the controller's loop does not wait for it. The text
format is version 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/); each tag is
a gauge, `train/loss` is megatron_async_rl_train_loss. Tags that would have the same name, such as
user/a.b and user/a-b, are distinguished by a label `tag`.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import re
import socket
import threading
from collections import defaultdict

from megatron_async_rl.errors import ConfigError

PREFIX = "megatron_async_rl"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
POLL_S = 0.1  # until the thread sees that it is to end
CLIENT_S = 5.0  # for a request; a silent or slow client must not keep out the others


class Prometheus:
    """A ScalarLogger (loggers.py). Raises ConfigError if it cannot listen there."""

    def __init__(self, host: str, port: int) -> None:
        self._gauges: dict[str, float] = {}  # by tag
        handler = type("Handler", (_Handler,), {"gauges": self._gauges})
        try:
            self._server = http.server.HTTPServer((host, port), handler)
        except OSError as e:
            raise ConfigError(
                f"monitor.prometheus_port = {port} cannot be used at {host}: {e.strerror}",
                "choose another port, or an address of this host as monitor.prometheus_host",
            ) from None
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=lambda: self._server.serve_forever(POLL_S), name="prometheus", daemon=True
        )
        self._thread.start()

    def scalars(self, version: int, values: dict[str, float]) -> None:
        newest = {tag: float(value) for tag, value in values.items()}
        self._gauges.update(newest, version=float(version))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    gauges: dict[str, float]
    server_version, sys_version = PREFIX, ""

    def handle(self) -> None:
        # not by `timeout`, which a client that sends a byte now and then never reaches
        limit = threading.Timer(CLIENT_S, self._cut_off)
        limit.daemon = True
        limit.start()
        try:
            with contextlib.suppress(OSError):  # the client is gone
                super().handle()
        finally:
            limit.cancel()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "metrics are at /metrics")
            return
        body = exposition(dict(self.gauges)).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: Prometheus asks every few seconds."""


def metric_name(tag: str) -> str:
    """Returns the name of a tag; characters that Prometheus does not allow become `_`."""
    return f"{PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', tag)}"


def exposition(gauges: dict[str, float]) -> str:
    """Returns the text format of gauges by tag."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for tag in sorted(gauges):
        by_name[metric_name(tag)].append(tag)
    lines = []
    for name, tags in by_name.items():
        lines.append(f"# TYPE {name} gauge")
        for tag in tags:
            label = "{tag=" + json.dumps(tag) + "}" if len(tags) > 1 else ""
            lines.append(f"{name}{label} {_value(gauges[tag])}")
    return "\n".join([*lines, ""])


def _value(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
