"""Requirements on the host, as marks that skip a test elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from megatron_async_rl.engine_env import engine_python

SANDBOX_PYTHON = "/usr/bin/python3"


def has_network_namespaces() -> bool:
    if not all(shutil.which(name) for name in ("unshare", "ip", "cc")):
        return False
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    enter = ["unshare", "--net", "--mount", *as_root, *"ip link set lo up".split()]
    return subprocess.run(enter, capture_output=True, timeout=30, check=False).returncode == 0


needs_network_namespaces = pytest.mark.skipif(
    not has_network_namespaces(), reason="needs Linux namespaces, `ip` and a C compiler"
)
needs_engine = pytest.mark.skipif(
    engine_python() is None, reason="no engine environment: bash tools/setup_env.sh"
)
