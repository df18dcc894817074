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
import io
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jail

del sys.path[0]

OUT_OF_MEMORY, RAISED = 71, 72  # exit codes of a program's process, next to its own
MAX_DEPTH = 64  # nesting of a returned value


def main() -> None:
    settings = json.loads(sys.argv[2])
    link = socket.socket(fileno=int(sys.argv[1]))
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
    # the child is init of the new pid namespace: when it ends, the kernel kills all in there
    if has_namespaces and (init := os.fork()):
        link.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 255)
    jail.die_with_parent()
    for module in settings["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
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
    program = os.fork()
    if program == 0:
        code = RAISED
        try:
            link.close()
            code = run(job, settings, descriptors, confined_write)
        finally:
            os._exit(code & 255)
    for descriptor in (*descriptors, confined_write):
        os.close(descriptor)
    handle = os.pidfd_open(program)
    ended, killed = wait(handle, link, time.monotonic() + job["wall_s"])
    if not ended:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
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


def wait(handle: int, link: socket.socket, deadline: float) -> tuple[bool, bool]:
    """Returns whether the program ended by itself, and whether a message asks to kill it."""
    remaining_s = max(0.0, deadline - time.monotonic())
    sources: list[int | socket.socket] = [handle, link]
    ready = select.select(sources, [], [], remaining_s)[0]
    if handle in ready:
        return True, False
    if link in ready:
        link.recv(16)
        return False, True
    return False, False


# ---- the program's process


def run(
    job: dict[str, Any], settings: dict[str, Any], descriptors: Iterable[int], confined_write: int
) -> int:
    """Confines this process, then runs the program. Returns the exit code."""
    jail.die_with_parent()
    os.setsid()
    program, given, output = descriptors
    source = os.pread(program, os.fstat(program).st_size, 0).decode("utf-8", "replace")
    null = os.open(os.devnull, os.O_WRONLY)
    for number, descriptor in enumerate((given, output, null, confined_write)):
        os.dup2(descriptor, number)
    os.closerange(4, 4096)
    jail.confine(job, settings["readable"], settings["disabled_layers"])
    os.write(3, b"1")
    os.close(3)
    sys.setrecursionlimit(20000)
    try:
        if job["function"]:
            call(source, job["function"])
        else:
            run_script(source)
    except SystemExit as e:
        return e.code if type(e.code) is int else int(e.code is not None)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return RAISED
    return 0


def run_script(source: str) -> None:
    """Runs a program that reads stdin and prints."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    output = io.BufferedWriter(io.FileIO(1, "w"))
    sys.stdout = io.TextIOWrapper(output, encoding="utf-8", errors="replace")
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def call(source: str, name: str) -> None:
    """Calls the program's function `name`, or that method of its class Solution, per argument list.

    Writes each returned value as a frame: four bytes of length (little-endian), then JSON.
    """
    output, sys.stdout = io.BufferedWriter(io.FileIO(1, "w")), io.StringIO()
    calls = json.loads(io.FileIO(0).readall())
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(source, "<program>", "exec"), names)
    function = getattr(names["Solution"](), name) if "Solution" in names else names[name]
    for arguments in calls:
        frame = json.dumps(to_plain(function(*arguments))).encode()
        output.write(struct.pack("<I", len(frame)) + frame)
    output.flush()


def to_plain(value: Any, depth: int = 0) -> Any:
    """Converts a returned value to JSON data.

    Accepts exact types only: no object with an `__eq__` of its own leaves this process.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind in (int, float, str, bool, type(None)):
        return value
    if kind in (list, tuple):
        return [to_plain(one, depth + 1) for one in value]
    if kind is dict and all(type(key) in (str, int, float, bool) for key in value):
        items = value.items()
        return {"dict": [[to_plain(key), to_plain(one, depth + 1)] for key, one in items]}
    if kind in (set, frozenset):
        return {"set": sorted((to_plain(one, depth + 1) for one in value), key=repr)}
    raise TypeError(f"a result of type {kind.__name__}")


if __name__ == "__main__":
    main()
