"""Writes a picture of a run's live display: python tools/screenshot.py RUN_DIR OUT.svg"""

import sys
from pathlib import Path

from megatron_async_rl.observability.panel import screenshot_svg
from megatron_async_rl.observability.status import read_status

if __name__ == "__main__":
    run_dir, out = map(Path, sys.argv[1:])
    out.write_text(screenshot_svg(read_status(run_dir)))
