"""Our end of the sandbox: starts a zygote, hands it programs, and says how each ended. Trusted; tests stay on this side.

    with Box(BoxSettings(python="/usr/bin/python3")) as box:
        result = box.run(program, b"3 4\n", Limits())            # reads stdin, prints
        result = box.run(program, arguments, Limits(), "add")    # one call of `add` per list of arguments

A result is how the program ended and what it wrote; what that is worth is the judge's affair (code_answer.py). A zygote
that is lost is BoxLost, an error of ours and never a verdict; the next `run` starts another.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megatron_async_rl.errors import Error

_MEMORY_RAN_OUT = 71  # zygote.py's exit code
ZYGOTE = Path(__file__).with_name("zygote.py")
START_S = 30.0
GRACE_S = 2.0  # the zygote's own clock ends a program; past that the zygote itself hangs
OLDEST_PYTHON = (3, 9)
PRELOAD = (
    *(
        "math",
        "itertools",
        "collections",
        "heapq",
        "bisect",
        "functools",
        "string",
        "re",
        "operator",
        "random",
        "copy",
    ),
    *(
        "typing",
        "fractions",
        "decimal",
        "datetime",
        "statistics",
        "io",
        "types",
        "array",
        "json",
        "time",
        "threading",
    ),
    *(
        "cmath",
        "numbers",
        "enum",
        "dataclasses",
        "abc",
        "textwrap",
        "calendar",
        "hashlib",
        "queue",
        "contextlib",
    ),
)


class BoxError(Error):
    """This host cannot confine programs as it is asked to."""


class BoxLost(Exception):
    """The zygote ended, hung or spoke nonsense: nothing is known of the program."""


class End(Enum):
    OK = "ended"
    RAISED = "raised an exception or ended with an exit code"
    TIME = "took too long"
    MEMORY = "ran out of memory"
    OUTPUT = "wrote too much"
    FORBIDDEN = "asked the kernel for what no honest program needs"
    KILLED = "was killed by a signal"


@dataclass(frozen=True)
class Limits:
    wall_s: float = 5.0
    memory_bytes: int = 1 << 30  # address space
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class BoxSettings:
    python: str  # the interpreter of the programs
    isolation: Literal["namespaces", "landlock"] = (
        "namespaces"  # the least that will do; more is taken where it can be had
    )
    preload: tuple[str, ...] = PRELOAD
    without: tuple[str, ...] = ()  # layers switched off, to test the others


@dataclass(frozen=True)
class Result:
    end: End
    output: bytes
    frames: list[Any] = field(default_factory=list)  # of calls: what each returned


class Box:
    """One zygote, and one program at a time."""

    def __init__(self, settings: BoxSettings) -> None:
        self._settings = settings
        self._zygote: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._num_jobs = 0
        self.num_started = 0  # zygotes; more than one means that some were lost
        self.has_namespaces = False

    def __enter__(self) -> Box:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Raises BoxError when this host cannot confine programs as `isolation` asks."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "isolation": self._settings.isolation,
            "preload": self._settings.preload,
            "readable": _libraries(self._settings.python),
            "without": self._settings.without,
        }
        command = [
            self._settings.python,
            "-I",
            "-B",
            str(ZYGOTE),
            str(theirs.fileno()),
            json.dumps(settings),
        ]
        self.num_started += 1
        try:
            self._zygote = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # nothing of ours: no key, no address
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise BoxError(f"{self._settings.python} cannot be started: {e.strerror}") from None
        finally:
            theirs.close()
        self._link = ours
        ours.settimeout(START_S)
        try:
            ready = json.loads(ours.recv(1 << 12))
        except (OSError, ValueError):
            words = self._last_words()
            self.close()
            raise BoxError(
                f"the sandbox did not start with {self._settings.python}: {words}"
            ) from None
        if ready["error"] or tuple(ready["python"]) < OLDEST_PYTHON:
            self.close()
            raise BoxError(
                ready["error"]
                or f"{self._settings.python} is Python {ready['python']}, must be 3.9 or newer"
            )
        self.has_namespaces = ready["namespaces"]

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.communicate()
            self._zygote = None

    def run(
        self, program: str, given: bytes | list[list[Any]], limits: Limits, function: str = ""
    ) -> Result:
        """Runs it on one input, or calls `function` on every list of arguments. Raises BoxLost, BoxError."""
        if self._link is None:
            self.start()
        data = given if isinstance(given, bytes) else json.dumps(given).encode()
        try:
            result = self._run(program, data, limits, function)
        except (OSError, ValueError, KeyError) as e:
            self.close()
            raise BoxLost(f"{type(e).__name__}: {e}") from None
        except (
            BaseException
        ):  # the caller's own deadline, say: what the zygote is at is not known then
            self.close()
            raise
        if function and result.end is End.OK:
            frames = _frames(result.output)
            if frames is None or len(frames) != len(given):
                return Result(End.RAISED, result.output)
            return Result(End.OK, result.output, frames)
        return result

    def _run(self, program: str, data: bytes, limits: Limits, function: str) -> Result:
        assert self._link is not None
        self._num_jobs += 1
        job = {
            "id": self._num_jobs,
            "function": function,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
        }
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, read_end)
            with contextlib.ExitStack() as theirs:
                theirs.callback(os.close, write_end)
                handed = [
                    _in_memory(text, theirs) for text in (program.encode("utf-8", "replace"), data)
                ]
                descriptors = array.array("i", [*handed, write_end])
                self._link.sendmsg(
                    [json.dumps(job).encode()],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
                )
            output, report = self._collect(read_end, limits)
        if report["id"] != self._num_jobs:
            raise ValueError(f"an answer to job {report['id']}, not {self._num_jobs}")
        return _result(output, report, limits)

    def _collect(self, read_end: int, limits: Limits) -> tuple[bytes, dict[str, Any]]:
        """What the program wrote, and how it ended."""
        assert self._link is not None
        output, report = bytearray(), None
        deadline = time.monotonic() + limits.wall_s + GRACE_S
        is_open = True
        while report is None:
            waits = [self._link, *([read_end] if is_open else [])]
            ready = select.select(waits, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise TimeoutError("the zygote did not say how the program ended")
            if read_end in ready:
                chunk = os.read(read_end, 1 << 16)
                output += chunk
                is_open = bool(chunk)
                if len(output) > limits.output_bytes:
                    is_open = False
                    self._link.send(b"end it")
            if self._link in ready:
                report = json.loads(self._link.recv(1 << 12))
        while is_open and len(output) <= limits.output_bytes and (chunk := self._rest(read_end)):
            output += chunk
        return bytes(output), report

    @staticmethod
    def _rest(read_end: int) -> bytes:
        """What is left in the pipe; nothing when someone still holds its other end and writes nothing."""
        return os.read(read_end, 1 << 16) if select.select([read_end], [], [], 0)[0] else b""

    def _last_words(self) -> str:
        if self._zygote is None or self._zygote.stderr is None:
            return ""
        self._zygote.kill()
        lines = self._zygote.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def _libraries(python: str) -> list[str]:
    """What a program may read: the libraries of its interpreter, of the virtual environment that this is, and the system's."""
    prefixes = {Path("/usr"), Path(python).parent.parent, Path(python).resolve().parent.parent}
    folders = [prefix / name for prefix in prefixes for name in ("lib", "lib64", "share/zoneinfo")]
    return sorted(str(folder) for folder in folders if folder.is_dir())


def _in_memory(data: bytes, opened: contextlib.ExitStack) -> int:
    """A descriptor to read it from, and no way to change it."""
    writable = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(writable), "wb") as file:
            file.write(data)
        readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
    opened.callback(os.close, readable)
    return readable


def _result(output: bytes, report: dict[str, Any], limits: Limits) -> Result:
    if not report["confined"]:
        raise ValueError("the jail could not be closed around a program")
    status = int(report["status"])
    if len(output) > limits.output_bytes:
        return Result(End.OUTPUT, b"")
    if report["too_long"]:
        return Result(End.TIME, b"")
    if os.WIFSIGNALED(status):
        ends = {signal.SIGXCPU: End.TIME, signal.SIGXFSZ: End.OUTPUT, signal.SIGSYS: End.FORBIDDEN}
        return Result(ends.get(signal.Signals(os.WTERMSIG(status)), End.KILLED), b"")
    ends = {0: End.OK, _MEMORY_RAN_OUT: End.MEMORY}
    return Result(ends.get(os.WEXITSTATUS(status), End.RAISED), output)


def _frames(output: bytes) -> list[Any] | None:
    frames, offset = [], 0
    try:
        while offset < len(output):
            (size,) = struct.unpack_from("<I", output, offset)
            frames.append(json.loads(output[offset + 4 : offset + 4 + size]))
            offset += 4 + size
    except (struct.error, ValueError, RecursionError):
        return None
    return frames
