"""The Python files of the repository, for tests that read the source."""

from __future__ import annotations

from pathlib import Path

from paths import ROOT

PACKAGE = "megatron_async_rl"


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
