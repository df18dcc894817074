"""`prepare`: turns a published dataset into rows of this package and prints a report."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_async_rl.data.prepare.pipeline import Options, Report, prepare, report_path


def run(kind: str, source: str, out: Path, options: Options) -> int:
    """Writes OUT and its report. Raises ConfigError or DataError."""
    report = prepare(kind, source, out, options, lambda text: print(text, file=sys.stderr))
    console = Console(soft_wrap=True)
    console.print(_table(report))
    for path, digest in report.files.items():
        console.print(f"{path}  sha256 {digest[:16]}", highlight=False)
    for found in report.contaminated[:5]:
        console.print(
            f"in an evaluation set: {found.row} and {found.evaluation}: {found.words}",
            highlight=False,
            markup=False,
        )
    console.print(f"all figures: {report_path(out)}", highlight=False)
    return 0


def _table(report: Report) -> Table:
    table = Table(title=f"{report.kind}: {report.source}", title_justify="left")
    table.add_column("rows")
    table.add_column("number", justify="right")
    table.add_row("read", f"{report.read:,}")
    table.add_row("kept", f"{report.kept:,}")
    if report.validation:
        table.add_row("kept for validation", f"{report.validation:,}")
    for reason, count in report.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    if report.left_out_tests:
        table.add_row("tests left out by --max-tests", f"{report.left_out_tests:,}")
    for name, values in report.lengths.items():
        text = ", ".join(f"{key} {value:,}" for key, value in values.items())
        table.add_row(name, text)
    return table
