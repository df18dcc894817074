"""Makes a picture of a run.

python tools/screenshot.py RUN_DIR OUT.svg    the live display
python tools/screenshot.py RUN_DIR OUT.png    the first page of TensorBoard; needs Chromium
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from megatron_async_rl import processes
from megatron_async_rl.addresses import free_port
from megatron_async_rl.observability.panel import screenshot_svg
from megatron_async_rl.observability.run_log import TENSORBOARD_DIR
from megatron_async_rl.observability.status import read_status

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WINDOW = "1500,1095"
START_S, DRAW_S = 120, 60


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
    if out.suffix == ".png":
        tensorboard_png(run_dir, out)
    else:
        out.write_text(screenshot_svg(read_status(run_dir)))
