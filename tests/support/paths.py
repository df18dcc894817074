"""Folders of the repository, and the environment of programs that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TOOLS = ROOT / "tools"


def python_environment(**more: str) -> dict[str, str]:
    """Returns an environment in which Python finds the package and tests/support/."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]), **more}
