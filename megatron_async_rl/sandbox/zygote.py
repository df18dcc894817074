"""The process that programs are forked from: it has the interpreter loaded, the namespaces entered and the privileges dropped.

    python -I -B zygote.py SOCKET SETTINGS      SETTINGS: JSON, see box.py

Over the socket (SEQPACKET) come jobs, one at a time: JSON, with three descriptors: the program, its input, where its output
goes. Back goes how it ended. It never sees what is expected of a program, nor any other program's input: only this job's.
While a program runs, any message on the socket means that it is to be ended.

Standard library alone, and Python 3.9.
"""

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import jail

del sys.path[0]

MEMORY_RAN_OUT, RAISED = 71, 72  # exit codes of a program's process, beside its own
DEPTH = 64  # of a result: deeper than any honest one


def main():
    settings = json.loads(sys.argv[2])
    link = socket.socket(fileno=int(sys.argv[1]))
    jail.die_with_parent()
    error, namespaces = "", False
    if not jail.is_supported() or not jail.landlock_version():
        error = "this host is not Linux on x86-64 with Landlock (5.13 or newer)"
    jail.drop_privileges()
    jail.die_with_parent()  # forgotten when the user changes
    if "namespaces" not in settings["without"]:
        try:
            jail.enter_namespaces()
            namespaces = True
        except OSError as e:
            error = error or (
                f"no new namespaces: {e}" if settings["isolation"] == "namespaces" else ""
            )
    if namespaces and (
        init := os.fork()
    ):  # the child is init of the new pid namespace: with it all of it ends
        link.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 255)
    jail.die_with_parent()
    for module in settings["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    link.send(
        json.dumps(
            {"error": error, "namespaces": namespaces, "python": sys.version_info[:2]}
        ).encode()
    )
    while not error and serve(link, settings, namespaces):
        pass


def serve(link, settings, namespaces):
    """One job. False: nobody is there any more."""
    message, ancillary, _, _ = link.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 4))
    if not message:
        return False
    if not ancillary:
        return True  # to end a program that has just ended by itself
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    job = json.loads(message)
    confined, says_confined = os.pipe()
    program = os.fork()
    if program == 0:
        code = RAISED
        try:
            link.close()
            code = run(job, settings, *descriptors, says_confined)
        finally:
            os._exit(code & 255)
    for descriptor in (*descriptors, says_confined):
        os.close(descriptor)
    handle = os.pidfd_open(program)
    ended, told_to_end = wait(handle, link, time.monotonic() + job["wall_s"])
    if not ended:
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    was_confined = bool(
        os.read(confined, 1)
    )  # said before the program had its turn, over what it never had
    os.close(confined)
    os.close(handle)
    if namespaces:
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                -1, signal.SIGKILL
            )  # all of this pid namespace but us; seccomp let none of them begin
    report = {
        "id": job["id"],
        "status": status,
        "too_long": not ended and not told_to_end,
        "confined": was_confined,
    }
    link.send(json.dumps(report).encode())
    return True


def wait(handle, link, deadline):
    """(it ended by itself, we were told to end it)."""
    left = deadline - time.monotonic()
    ready = select.select([handle, link], [], [], max(0.0, left))[0]
    if handle in ready:
        return True, False
    if link in ready:
        link.recv(16)
        return False, True
    return False, False


# ---- the program's process


def run(job, settings, program, given, output, says_confined):
    jail.die_with_parent()
    os.setsid()
    source = os.pread(program, os.fstat(program).st_size, 0).decode("utf-8", "replace")
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number, descriptor in enumerate((given, output, nothing, says_confined)):
        os.dup2(descriptor, number)
    os.closerange(4, 4096)
    jail.confine(job, settings["readable"], settings["without"])
    os.write(3, b"1")
    os.close(3)
    sys.setrecursionlimit(20000)
    try:
        if job["function"]:
            call(source, job["function"])
        else:
            stdio(source)
    except SystemExit as e:
        return e.code if type(e.code) is int else int(e.code is not None)
    except MemoryError:
        return MEMORY_RAN_OUT
    except BaseException:
        return RAISED
    return 0


def stdio(source):
    """The program reads its input and prints."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8", errors="replace"
    )
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def call(source, name):
    """The program defines a function (or a class Solution with it); what each call returns goes out as one frame."""
    output, sys.stdout = io.BufferedWriter(io.FileIO(1, "w")), io.StringIO()
    calls = json.loads(io.FileIO(0).readall())
    names = {"__name__": "program"}
    exec(compile(source, "<program>", "exec"), names)
    function = getattr(names["Solution"](), name) if "Solution" in names else names[name]
    for arguments in calls:
        frame = json.dumps(plain(function(*arguments))).encode()
        output.write(struct.pack("<I", len(frame)) + frame)
    output.flush()


def plain(value, depth=0):
    """A result as data. Exact types only: an object that says it equals anything stays here."""
    kind = type(value)
    if depth > DEPTH:
        raise ValueError("nested too deep")
    if kind in (int, float, str, bool, type(None)):
        return value
    if kind in (list, tuple):
        return [plain(one, depth + 1) for one in value]
    if kind is dict and all(type(key) in (str, int, float, bool) for key in value):
        return {"dict": [[plain(key), plain(one, depth + 1)] for key, one in value.items()]}
    if kind in (set, frozenset):
        return {"set": sorted((plain(one, depth + 1) for one in value), key=repr)}
    raise TypeError(f"a result of type {kind.__name__}")


main()
