"""Is everything here that a run needs? `checks` for a person to read, `preflight` for `run` before it starts anything.

One function per question; it answers with a Check: what was found and, where that will not do, the command or setting
that mends it. Nothing heavy is imported: versions come from the installed metadata, the engine's from its own Python.
What a configuration asks for is looked at in run_checks.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import Error
from megatron_async_rl.launcher.preflight import (
    GIB,
    SETUP,
    Check,
    check_engine,
    config_checks,
    size_text,
)
from megatron_async_rl.patches import patches_dir

CPU_VERSIONS = {"torch": "~=2.13.0", "megatron-core": "~=0.16.1"}
GPU_VERSIONS = {"torch": ">=2.11", "megatron-core": "~=0.19.2"}
VERSIONS = dict.fromkeys(
    ("transformers", "tokenizers", "safetensors", "numpy", "msgspec", "tensorboard"), ">=0"
)
PYTHON_VERSIONS = ">=3.11,<3.13"

MIN_CORES, MIN_MEMORY_BYTES, MIN_DISK_BYTES = 2, 4 * GIB, GIB
MIN_SHM_BYTES = {"CPU": 64 << 20, "GPU": GIB}  # gloo wants little of /dev/shm, NCCL a lot


def checks(config: Config | None) -> list[Check]:
    """Everything there is to know about this host and, with a config, about the run."""
    gpus = _gpus()
    return [
        _python(),
        *(
            _distribution(name, versions)
            for name, versions in (GPU_VERSIONS if gpus else CPU_VERSIONS).items()
        ),
        *(_distribution(name, versions) for name, versions in VERSIONS.items()),
        _pyzmq(),
        _curve(),
        _apex(),
        check_engine(),
        _patches(),
        Check("devices", True, ", ".join(gpus) if gpus else "CPU (no nvidia-smi here)"),
        _cores(),
        _memory(),
        _shm("GPU" if gpus else "CPU"),
        _disk(config),
        _loopback(),
        *([] if config is None else config_checks(config)),
    ]


def run(config_path: str | os.PathLike[str] | None, console: Console | None = None) -> int:
    """Prints the checks; 1 when something is missing."""
    console = console or Console()
    config, results = None, []
    if config_path is not None:
        try:
            config = configuration.load(config_path)
        except Error as e:
            results = [Check("configuration", False, str(e), "correct the YAML")]
    results = [*checks(config), *results]
    table = Table("", "", "", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for check in results:
        mark = "[green]ok[/]" if check.ok else "[bold red]no[/]"
        detail = check.detail if check.ok else f"{check.detail}\n-> {check.remedy}"
        table.add_row(mark, check.name, Text(detail))
    console.print(table)
    missing = [check.name for check in results if not check.ok]
    console.print(
        f"\n{len(missing)} to mend: {', '.join(missing)}" if missing else "\nall there",
        highlight=False,
    )
    return 1 if missing else 0


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if not SpecifierSet(PYTHON_VERSIONS).contains(version):
        return Check("Python", False, f"{version}, supported is {PYTHON_VERSIONS}", SETUP)
    return Check("Python", True, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distribution(name: str, versions: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, False, "not installed", SETUP)
    if not SpecifierSet(versions).contains(version, prereleases=True):
        return Check(
            name,
            False,
            f"{version}, supported is {versions}",
            f"pip install '{name}{versions}', or {SETUP}",
        )
    return Check(name, True, version)


def _pyzmq() -> Check:
    """On PyPI `zmq` is a shim; the package is `pyzmq`."""
    version, shim = _version("pyzmq"), _version("zmq")
    if version is None:
        found = "not installed; `zmq` is, but that is an empty shim" if shim else "not installed"
        return Check("pyzmq", False, found, "pip install pyzmq")
    return Check(
        "pyzmq",
        True,
        version + (" (the empty shim `zmq` is installed too: no harm)" if shim else ""),
    )


def _curve() -> Check:
    try:
        from megatron_async_rl.protocol.transport import has_curve
    except ImportError as e:
        return Check("CURVE", False, f"cannot tell: {e}", "pip install --force-reinstall pyzmq")
    if not has_curve():
        return Check(
            "CURVE",
            False,
            "this libzmq was built without it, and no socket of ours opens without",
            "pip install pyzmq",
        )
    return Check("CURVE", True, "libzmq authenticates and encrypts")


def _apex() -> Check:
    """On PyPI `apex` is a web toolkit of 2013; NVIDIA's has to be built from its repository."""
    try:
        metadata = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return Check("apex", True, "not installed; not needed")
    if (
        "nvidia"
        not in f"{metadata['Summary']} {metadata['Author']} {metadata['Description']}".lower()
    ):
        return Check(
            "apex", False, f"{metadata['Version']} is not NVIDIA's Apex", "pip uninstall apex"
        )
    return Check("apex", True, f"{metadata['Version']} of NVIDIA")


def _patches() -> Check:
    try:
        return Check("patches", True, str(patches_dir()))
    except FileNotFoundError as e:
        return Check("patches", False, str(e), SETUP)


def _gpus() -> list[str]:
    """Like `NVIDIA H100 80GB HBM3 (81559 MiB)`; none where nvidia-smi is missing or finds no device."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    return [
        "{} ({})".format(*line.split(", "))
        for line in answer.stdout.splitlines()
        if line.count(", ") == 1
    ]


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} for this process"
    return Check("cores", cores >= MIN_CORES, detail, f"give the job at least {MIN_CORES} cores")


def _memory() -> Check:
    """What the host has left, or what is left to this cgroup where that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the host's number stands
    remedy = f"the smallest run needs {size_text(MIN_MEMORY_BYTES)}: give the job more memory"
    return Check("memory", free >= MIN_MEMORY_BYTES, f"{size_text(free)} available", remedy)


def _shm(device: str) -> Check:
    needed = MIN_SHM_BYTES[device]
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", False, "missing", "mount it; in a container: --shm-size=8g")
    free = shutil.disk_usage("/dev/shm").free
    return Check(
        "/dev/shm",
        free >= needed,
        f"{size_text(free)} free",
        f"needs {size_text(needed)}; in a container: --shm-size=8g",
    )


def _disk(config: Config | None) -> Check:
    """Room for the logs and for the model that the run writes at its end."""
    run_dir = Path.cwd() if config is None else config.run_dir.absolute()
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    needed = MIN_DISK_BYTES
    if config is not None:
        needed += sum(path.stat().st_size for path in Path(config.model.path).glob("*.safetensors"))
    key = "run.dir" if config else "this folder"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check(
            "disk",
            False,
            f"{key} = {run_dir}: {folder} cannot be written",
            "set run.dir to a folder of yours",
        )
    free = shutil.disk_usage(folder).free
    detail = f"{key} = {run_dir}: {size_text(free)} free, {size_text(needed)} needed"
    return Check("disk", free >= needed, detail, "make room, or set run.dir to another file system")


def _loopback() -> Check:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as e:
        return Check(
            "loopback",
            False,
            f"no port of 127.0.0.1 can be used: {e}",
            "bring the interface up: ip link set lo up",
        )
    return Check("loopback", True, "ports of 127.0.0.1 can be used")
