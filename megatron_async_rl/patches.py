"""Finds the folder patches/ and applies patches of third-party packages to the current process.

A process applies a patch by a call at its start, never as a side effect of an import. A patch that
does not fit the installed version raises DriftError and so stops the process. patches/README.md
lists them all.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path


def patches_dir() -> Path:
    """Returns patches/ of a checkout, or its copy megatron_async_rl/_patches in an installed
    package.

    Raises FileNotFoundError where there is neither.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "patches", package / "_patches"):
        if (candidate / "megatron_cpu").is_dir():
            return candidate
    raise FileNotFoundError(
        f"no patches folder next to {package} and no _patches in it; install the package with pip, "
        "or run it from a checkout"
    )


def apply(name: str) -> None:
    """Applies patches/NAME to this process; a second call does nothing."""
    folder = str(patches_dir())
    if folder not in sys.path:
        sys.path.append(folder)  # last: no name in it may shadow an installed package
    importlib.import_module(name).install()


def prepare_megatron() -> None:
    """Makes megatron.core importable and usable here; call it before its first import."""
    gc.disable()  # collections during the imports find nothing and take a sixth of the time
    apply("megatron_cpu")
    apply("megatron_checkpoint")
    gc.freeze()  # later collections then skip the objects that stay
    gc.enable()
