"""A network, a disk and clocks for one chaos job, which can fail without effect on other processes.

All of it is inside namespaces that end with the tool (`unshare --net --mount`, as root or with
--map-root-user):

    network   this namespace is host A (10.77.0.1); host B (10.77.1.2) is a second one, behind a
              router that can silently drop either direction. Both ends see a partition as between
              machines: no error, no reset.
    disk      with --disk-mb the parent of run.dir is a file system of that size, in an image file
              that is kept over restarts.
    clocks    a shim under LD_PRELOAD (clock_shim.c, built with the host's C compiler) adds an
              offset to CLOCK_REALTIME, gettimeofday and time, for one or all processes of the job.
              The clock of the machine is not changed.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSIDE = "CHAOS_NAMESPACE"
HOST_A, HOST_B, ROUTER_A, ROUTER_B = "10.77.0.1", "10.77.1.2", "10.77.0.254", "10.77.1.254"


def enter() -> None:
    """Runs this program again inside new namespaces; returns only there."""
    if os.environ.get(INSIDE):
        return
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "--net", "--mount", *as_root, "--", sys.executable, *sys.argv])


class Namespaces:
    def __init__(self, folder: Path) -> None:
        """`folder` holds the clock's offset and the flags that hooks read."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._clock = folder / "clock"
        self.move_clock(0, 0)
        self._shim = folder / "clock_shim.so"
        _run("cc", "-shared", "-fPIC", "-O2", "-o", str(self._shim), str(HERE / "clock_shim.c"))
        _run("ip", "link", "set", "lo", "up")

    # ---- hosts

    def make_hosts(self) -> None:
        _run("mount", "-t", "tmpfs", "none", "/run")
        Path("/run/netns").mkdir()
        for name in ("router", "b"):
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "a0", "type", "veth", "peer", "name", "r0", "netns", "router")
        second_link = ("link", "add", "r1", "type", "veth", "peer", "name", "b0", "netns", "b")
        _run("ip", "-n", "router", *second_link)
        _run("ip", "addr", "add", f"{HOST_A}/24", "dev", "a0")
        _run("ip", "-n", "router", "addr", "add", f"{ROUTER_A}/24", "dev", "r0")
        _run("ip", "-n", "router", "addr", "add", f"{ROUTER_B}/24", "dev", "r1")
        _run("ip", "-n", "b", "addr", "add", f"{HOST_B}/24", "dev", "b0")
        _run("ip", "link", "set", "a0", "up")
        for host, device in (("router", "r0"), ("router", "r1"), ("b", "b0"), ("b", "lo")):
            _run("ip", "-n", host, "link", "set", device, "up")
        _run("ip", "route", "add", "10.77.1.0/24", "via", ROUTER_A)
        _run("ip", "-n", "b", "route", "add", "default", "via", ROUTER_B)
        _run("ip", "netns", "exec", "router", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def partition(self, host: str) -> None:
        """Makes the router silently drop all packets to that host."""
        _run("ip", "-n", "router", "route", "add", "blackhole", f"{host}/32")

    def heal(self, host: str) -> None:
        """Ends `partition`."""
        _run("ip", "-n", "router", "route", "del", "blackhole", f"{host}/32")

    # ---- disk

    def mount_disk(self, folder: Path, megabytes: int) -> None:
        """Mounts a file system of that size at `folder`."""
        image = folder.with_suffix(".image")
        folder.mkdir(parents=True, exist_ok=True)
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(megabytes << 20)
            _run("mkfs.ext4", "-q", "-m", "0", str(image))
        _run("mount", "-o", "loop", str(image), str(folder))

    # ---- clocks

    def move_clock(self, pid: int, offset_s: int) -> None:
        """Sets the offset of one process's wall clock (pid 0: of all); others stay right."""
        data = struct.pack("<qq", pid, offset_s * 10**9)
        if self._clock.exists():
            with self._clock.open("r+b") as file:  # in place, because the processes have it mapped
                file.write(data)
        else:
            self._clock.write_bytes(data)

    # ---- the job's environment

    def environment(self) -> dict[str, str]:
        repository = str(HERE.parents[2])
        paths = [
            str(HERE / "hooks"),
            str(HERE.parent),
            repository,
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_CLOCK": str(self._clock),
            "LD_PRELOAD": str(self._shim),
        }

    def raise_flag(self, name: str) -> Path:
        """Creates a flag for a hook inside the job (hooks/), which removes it when it has acted."""
        flag = self.folder / name
        flag.touch()
        return flag

    def wait_for_flag(self, name: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while (self.folder / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process removed the flag {name} within {limit_s:.0f} s")
            time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
