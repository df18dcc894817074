"""TODO."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

SANDBOX_PYTHON = "/usr/bin/python3"


def has_network_namespaces() -> bool:
    if not all(shutil.which(name) for name in ("unshare", "ip", "cc")):
        return False
    enter = [
        "unshare",
        "--net",
        "--mount",
        *([] if os.geteuid() == 0 else ["--map-root-user"]),
        "ip",
        "link",
        "set",
        "lo",
        "up",
    ]
    return subprocess.run(enter, capture_output=True, timeout=30, check=False).returncode == 0


needs_network_namespaces = pytest.mark.skipif(
    not has_network_namespaces(), reason="needs Linux namespaces, `ip` and a C compiler"
)
