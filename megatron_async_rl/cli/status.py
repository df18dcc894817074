"""`status`: prints the panel and the ledger of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from megatron_async_rl.errors import DataError
from megatron_async_rl.observability import panel
from megatron_async_rl.observability.status import read_status


def run(run_dir: Path) -> int:
    """Returns 1 if the folder has no run."""
    try:
        status = read_status(run_dir)
    except DataError as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    console = Console()
    console.print(panel.render(status))
    console.print(panel.ledger_table(status))
    return 0
