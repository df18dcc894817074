"""`doctor`: checks that this host, and with a CONFIG a run, has all that it needs.

Each function makes one check and returns a Check with the result and, on failure, the remedy. Only
metadata of installed packages is read, no package is imported here. The checks of a configuration
are those of launcher/preflight.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.warnings import warnings
from megatron_async_rl.errors import Error
from megatron_async_rl.installed import Say
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.checks.disk import GIB, size_text
from megatron_async_rl.launcher.checks.settings import check_megatron_together
from megatron_async_rl.launcher.gpus import visible_gpus
from megatron_async_rl.launcher.preflight import (
    SETUP,
    Check,
    check_engine,
    check_gpus,
    config_checks,
)
from megatron_async_rl.patches import patches_dir

CPU_VERSIONS = {"torch": "~=2.13.0", "megatron-core": "~=0.16.1"}
GPU_VERSIONS = {"torch": ">=2.11", "megatron-core": "~=0.19.2"}
VERSIONS = dict.fromkeys(
    ("transformers", "tokenizers", "safetensors", "numpy", "msgspec", "tensorboard"), ">=0"
)
PYTHON_VERSIONS = ">=3.11,<3.13"

# Checks without which Megatron-Core's configuration cannot be made.
NEEDED_BY_MEGATRON = {
    *("torch", "megatron-core", "model", "architecture", "trainer layout", "megatron settings")
}
MIN_CORES, MIN_MEMORY_BYTES, MIN_DISK_BYTES = 2, 4 * GIB, GIB
MIN_SHM_BYTES = {"CPU": 64 << 20, "GPU": GIB}  # gloo needs little of /dev/shm, NCCL much


def checks(config: Config | None, say: Say = print) -> list[Check]:
    """Returns the checks of this host and, with a config, those of the run."""
    gpus = _gpus() if visible_gpus() else []
    versions = (GPU_VERSIONS if gpus else CPU_VERSIONS) | VERSIONS
    found = [
        _python(),
        *(_distribution(name, supported) for name, supported in versions.items()),
        _pyzmq(),
        _curve(),
        _apex(),
        check_engine(config),
        _patches(),
        Check("devices", True, ", ".join(gpus) if gpus else "CPU (no GPU is visible)"),
        _cores(),
        _memory(),
        _shm("GPU" if gpus else "CPU"),
        _loopback(),
        *([_disk()] if config is None else [_run_gpus(config), *config_checks(config, say)]),
    ]
    failed = {check.name for check in found if not check.ok}
    if config and config.has_trainer and config.megatron and not failed & NEEDED_BY_MEGATRON:
        found.append(_megatron_together(config, say))
    return found


def run(
    config_path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Prints the checks, and a warning for each setting without effect. Returns 1 if one failed."""
    console = console or Console()
    config, results = None, []
    if config_path is not None:
        try:
            config = configuration.load(config_path, list(overrides))
        except Error as e:
            results = [Check("configuration", False, e.problem, e.remedy)]
    results = [*checks(config, lambda text: console.print(text, highlight=False)), *results]
    table = Table("", "", "", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"  # a long path is shown whole
    for check in results:
        mark = "[green]ok[/]" if check.ok else "[bold red]no[/]"
        remedy = "" if check.ok or not check.remedy else f"\n-> {check.remedy}"
        detail = check.detail + remedy
        table.add_row(mark, check.name, Text(detail))
    console.print(table)
    for text in [] if config is None else warnings(config):
        console.print(Text(f"warning: {text}", "yellow"))
    failed = [check.name for check in results if not check.ok]
    problems = f"{len(failed)} problem{'s' * (len(failed) > 1)}: {', '.join(failed)}"
    console.print(f"\n{problems}" if failed else "\nno problems", highlight=False)
    return int(bool(failed))


def _megatron_together(config: Config, say: Say) -> Check:
    try:
        return Check("megatron together", True, check_megatron_together(config, say))
    except Error as e:
        return Check("megatron together", False, e.problem, e.remedy)


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
        remedy = f"pip install '{name}{versions}', or {SETUP}"
        return Check(name, False, f"{version}, supported is {versions}", remedy)
    return Check(name, True, version)


def _pyzmq() -> Check:
    """The package `zmq` on PyPI is an empty shim; ZeroMQ's is `pyzmq`."""
    version, shim = _version("pyzmq"), _version("zmq")
    if version is None:
        found = "not installed; `zmq` is, but it is an empty shim" if shim else "not installed"
        return Check("pyzmq", False, found, "pip install pyzmq")
    note = " (the empty shim `zmq` is installed too, which is harmless)" if shim else ""
    return Check("pyzmq", True, version + note)


def _curve() -> Check:
    try:
        from megatron_async_rl.protocol.sockets import has_curve
    except ImportError as e:
        return Check("CURVE", False, f"not known: {e}", "pip install --force-reinstall pyzmq")
    if not has_curve():
        problem = "libzmq was built without CURVE, which every socket of a run requires"
        return Check("CURVE", False, problem, "pip install pyzmq")
    return Check("CURVE", True, "libzmq authenticates and encrypts")


def _apex() -> Check:
    """The package `apex` on PyPI is a web toolkit of 2013; NVIDIA's is built from its
    repository."""
    try:
        metadata = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return Check("apex", True, "not installed; not needed")
    texts = f"{metadata['Summary']} {metadata['Author']} {metadata['Description']}"
    if "nvidia" not in texts.lower():
        problem = f"{metadata['Version']} is not NVIDIA's Apex"
        return Check("apex", False, problem, "pip uninstall apex")
    return Check("apex", True, f"{metadata['Version']} of NVIDIA")


def _patches() -> Check:
    try:
        return Check("patches", True, str(patches_dir()))
    except FileNotFoundError as e:
        return Check("patches", False, str(e), SETUP)


def _gpus() -> list[str]:
    """Returns names such as `NVIDIA H100 80GB HBM3 (81559 MiB)`; none if nvidia-smi finds none."""
    text = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    lines = [line for line in text.splitlines() if line.count(", ") == 1]
    return ["{} ({})".format(*line.split(", ")) for line in lines]


def _output(*command: str) -> str:
    """Returns the output of a program, "" if it is missing or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if answer.returncode else answer.stdout


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} for this process"
    return Check("cores", cores >= MIN_CORES, detail, f"give the job at least {MIN_CORES} cores")


def _memory() -> Check:
    """Checks the available memory of the host, or of this cgroup if that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no cgroup v2: the host's value counts
    remedy = f"the smallest run needs {size_text(MIN_MEMORY_BYTES)}: give the job more memory"
    return Check("memory", free >= MIN_MEMORY_BYTES, f"{size_text(free)} available", remedy)


def _shm(device: str) -> Check:
    needed = MIN_SHM_BYTES[device]
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", False, "missing", "mount it; in a container: --shm-size=8g")
    free = shutil.disk_usage("/dev/shm").free
    remedy = f"{size_text(needed)} are needed; in a container: --shm-size=8g"
    return Check("/dev/shm", free >= needed, f"{size_text(free)} free", remedy)


def _disk() -> Check:
    """Checks the space of this folder, where run.dir often is."""
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"this folder: {size_text(free)} free"
    return Check("disk", free >= MIN_DISK_BYTES, detail, "free disk space, or use another folder")


def _run_gpus(config: Config) -> Check:
    """Checks the GPUs of this host, unless it belongs to a Slurm cluster that has others."""
    check = check_gpus(config, roles.names(config))
    if check.ok or "gpu" not in _output("sinfo", "--noheader", "--format=%G"):
        return check
    return Check("GPUs", True, f"{check.detail}; `slurm CONFIG --plan` shows the nodes of a job")


def _loopback() -> Check:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as e:
        problem = f"no port of 127.0.0.1 can be used: {e}"
        return Check("loopback", False, problem, "enable the interface: ip link set lo up")
    return Check("loopback", True, "ports of 127.0.0.1 can be used")
