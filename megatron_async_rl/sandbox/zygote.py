"""Forks one confined process per program; sandbox.py starts it in the programs' interpreter.

    python -I -B zygote.py SOCKET SETTINGS      SETTINGS: JSON, see Sandbox.start

It has the interpreter loaded, the namespaces entered and the privileges dropped. Over the socket
(SEQPACKET) it receives jobs one at a time: JSON and three descriptors (program, input, output), and
answers each with a report of how the program ended. While a program runs, any message kills it.
A job carries neither the expected output nor any other program's input.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jail
import program

del sys.path[0]

PRELOAD = (  # modules of many programs, beside program.STARTER_MODULES
    "abc calendar cmath contextlib dataclasses decimal enum fractions hashlib numbers queue "
    "textwrap threading types"
).split()
POLL_S = 0.01  # between two counts of a program's threads, where no namespace limits them


def main() -> None:
    settings = json.loads(sys.argv[2])
    # under a small number: select() refuses those from 1024 on
    link = socket.socket(fileno=os.dup(int(sys.argv[1])))
    os.close(int(sys.argv[1]))
    jail.die_with_parent()
    error, has_namespaces = "", False
    if not jail.is_supported() or not jail.landlock_version():
        error = "this host is not Linux on x86-64 with Landlock (5.13 or newer)"
    jail.drop_privileges()
    jail.die_with_parent()  # the kernel clears it when the user changes
    if "namespaces" not in settings["disabled_layers"]:
        try:
            jail.enter_namespaces()
            has_namespaces = True
        except OSError as e:
            if not error and settings["isolation"] == "namespaces":
                error = f"no new namespaces: {e}"
    jail.drop_capabilities()
    # the child is init of the new pid namespace: when it ends, the kernel kills all in there
    if has_namespaces and (init := os.fork()):
        link.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 255)
    jail.die_with_parent()
    error = error or jail.unreadable_folder(settings["readable"])
    if not error:
        for module in PRELOAD:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        settings["starter"] = program.starter_names()
        gc.collect()
        gc.freeze()
    ready = {"error": error, "namespaces": has_namespaces, "python": sys.version_info[:2]}
    link.send(json.dumps(ready).encode())
    while not error and serve(link, settings, has_namespaces):
        pass


def serve(link: socket.socket, settings: dict[str, Any], has_namespaces: bool) -> bool:
    """Runs one job. Returns False when the other end has closed the socket."""
    message, ancillary, _, _ = link.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 4))
    if not message:
        return False
    if not ancillary:
        return True  # a kill message for a program that had just ended
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    job = json.loads(message)
    confined_read, confined_write = os.pipe()
    child = os.fork()
    if child == 0:
        code = program.RAISED
        try:
            link.close()
            code = run(job, settings, descriptors, confined_write, has_namespaces)
        finally:
            os._exit(code & 255)
    for descriptor in (*descriptors, confined_write):
        os.close(descriptor)
    handle = os.pidfd_open(child)
    counted = None if has_namespaces else child
    ended, killed = wait(handle, link, time.monotonic() + job["wall_s"], counted)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    # written before the program ran, to a descriptor that it never had
    confined = bool(os.read(confined_read, 1))
    os.close(confined_read)
    os.close(handle)
    if has_namespaces:  # kills all of this pid namespace but init; seccomp allows no fork anyway
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    too_long = not ended and not killed
    report = {"id": job["id"], "status": status, "too_long": too_long, "confined": confined}
    link.send(json.dumps(report).encode())
    return True


def wait(
    handle: int, link: socket.socket, deadline: float, counted: int | None
) -> tuple[bool, bool]:
    """Returns whether the program ended by itself, and whether it is to be killed.

    A message ends it, and so do more than jail.MAX_THREADS threads if they are `counted`.
    """
    sources: list[int | socket.socket] = [handle, link]
    remaining_s = 1.0
    while remaining_s > 0:  # also looks if this process was not scheduled until the deadline
        remaining_s = max(0.0, deadline - time.monotonic())
        timeout_s = remaining_s if counted is None else min(remaining_s, POLL_S)
        ready = select.select(sources, [], [], timeout_s)[0]
        if handle in ready:
            return True, False
        if link in ready:
            link.recv(16)
            return False, True
        if counted is not None and jail.num_threads(counted) > jail.MAX_THREADS:
            return False, True
    return False, False


# ---- the program's process


def run(
    job: dict[str, Any],
    settings: dict[str, Any],
    descriptors: Iterable[int],
    confined_write: int,
    has_namespaces: bool,
) -> int:
    """Confines this process, then runs the program. Returns the exit code."""
    jail.die_with_parent()
    os.setsid()
    source_file, given, output = descriptors
    source = os.pread(source_file, os.fstat(source_file).st_size, 0)
    null = os.open(os.devnull, os.O_RDWR)
    calls, final = None, (given, output, null, confined_write)
    if job["function"]:
        calls = json.loads(os.pread(given, os.fstat(given).st_size, 0))
        final = (null, null, null, output, confined_write)  # type: ignore[assignment]
    for number, descriptor in enumerate(final):
        os.dup2(descriptor, number)
    confined = len(final) - 1
    os.closerange(len(final), 4096)
    max_threads = jail.MAX_THREADS if has_namespaces else None
    jail.confine(job, settings["readable"], settings["disabled_layers"], max_threads)
    os.write(confined, b"1")
    os.close(confined)
    sys.setrecursionlimit(20000)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    for name in ("jail", "program", "nodes"):
        del sys.modules[name]  # programs may have modules of these names
    if calls is None:
        return program.run_script(source)
    return program.run_calls(source, job["function"], calls, settings["starter"])


if __name__ == "__main__":
    main()
