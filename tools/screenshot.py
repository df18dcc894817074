"""A picture of a run's progress display: python tools/screenshot.py RUN_DIR OUT.svg"""

import sys
from pathlib import Path

from megatron_async_rl.observability.status import read_status
from megatron_async_rl.observability.panel import screenshot_svg

if __name__ == "__main__":
    run_dir, out = map(Path, sys.argv[1:])
    out.write_text(screenshot_svg(read_status(run_dir)))
