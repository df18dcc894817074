"""Trusted side of the sandbox: starts a zygote, sends it programs, reports how each one ended.

    with Sandbox("/usr/bin/python3") as sandbox:
        result = sandbox.run(program, b"3 4\n", Limits())         # reads stdin, prints
        result = sandbox.run(program, [[3, 4]], Limits(), "add")  # calls add(3, 4)

reward/code_answer.py compares the outputs; expected outputs never enter the sandbox. A lost zygote
is an infrastructure error (SandboxLost), never a failed test; the next `run` starts a new zygote.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import math
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
from typing import Any, Literal

from megatron_async_rl.errors import Error

ZYGOTE = Path(__file__).with_name("zygote.py")
OUT_OF_MEMORY_CODE = 71  # program.py's exit code for it
START_S = 30.0
GRACE_S = 5.0  # the zygote enforces wall_s itself; after this much more the zygote counts as hung
OLDEST_PYTHON = (3, 9)


class SandboxError(Error):
    """This host cannot confine programs as the settings require."""


class SandboxLost(Exception):
    """The zygote died, hung or sent an invalid report: the program's outcome is unknown."""


class End(Enum):
    OK = "ended"
    RAISED = "raised an exception or ended with an exit code"
    TIME = "took too long"
    MEMORY = "ran out of memory"
    OUTPUT = "wrote too much"
    FORBIDDEN = "made a forbidden system call"
    KILLED = "was killed by a signal"


@dataclass(frozen=True)
class Limits:
    wall_s: float = 5.0
    memory_bytes: int = 1 << 30  # address space
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Result:
    end: End
    output: bytes
    returned: list[Any] = field(default_factory=list)  # one value per call, see program.to_plain


class Sandbox:
    """One zygote; runs one program at a time.

    `python`: the interpreter of the programs. `isolation`: the minimum required; namespaces are
    used wherever the host provides them. `disabled_layers`: for tests of the remaining ones.
    """

    def __init__(
        self,
        python: str,
        isolation: Literal["namespaces", "landlock"] = "namespaces",
        disabled_layers: tuple[str, ...] = (),
    ) -> None:
        self._python, self._isolation, self._disabled_layers = python, isolation, disabled_layers
        self._zygote: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._num_jobs = 0
        self.num_started = 0  # zygotes; more than one means that some were lost
        self.has_namespaces = False

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the zygote. Raises SandboxError when this host cannot confine as required."""
        python = self._python
        settings = {
            "isolation": self._isolation,
            "readable": _library_folders(python),
            "disabled_layers": self._disabled_layers,
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.num_started += 1
        try:
            self._zygote = subprocess.Popen(
                [python, "-I", "-B", str(ZYGOTE), str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # inherits no variable: no key, no address
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise SandboxError(f"{python} cannot be started: {e.strerror}") from None
        finally:
            theirs.close()
        self._socket = ours
        ours.settimeout(START_S)
        try:
            ready = json.loads(ours.recv(1 << 12))
        except (OSError, ValueError):
            stderr = self._last_stderr_line()
            self.close()
            raise SandboxError(f"the sandbox did not start with {python}: {stderr}") from None
        error = ready["error"]
        if not error and tuple(ready["python"]) < OLDEST_PYTHON:
            error = f"{python} is Python {ready['python']}, must be 3.9 or newer"
        if error:
            self.close()
            raise SandboxError(error)
        self.has_namespaces = ready["namespaces"]
        self._check_that_programs_run()

    def _check_that_programs_run(self) -> None:
        """Runs a program. Raises SandboxError if it fails."""
        try:
            result = self._run("import csv\nprint(6 * 7)", b"", Limits(wall_s=START_S), "")
            failure = "" if result.output == b"42\n" else f"a first program {result.end.value}"
        except (OSError, ValueError, KeyError) as e:
            failure = f"{type(e).__name__}: {e}"
        if failure:
            self.close()
            raise SandboxError(f"{self._python} runs no program here: {failure}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._zygote is not None:
            _kill_all(self._zygote)
            self._zygote.communicate()
            self._zygote = None

    def run(
        self, program: str, given: bytes | list[list[Any]], limits: Limits, function: str = ""
    ) -> Result:
        """Runs `program` with `given` as stdin, or calls its `function` once per argument list.

        Raises SandboxLost, and SandboxError when a new zygote is needed and cannot start.
        """
        if self._socket is None:
            self.start()
        data = given if isinstance(given, bytes) else json.dumps(given).encode()
        try:
            result = self._run(program, data, limits, function)
        except (OSError, ValueError, KeyError) as e:
            self.close()
            raise SandboxLost(f"{type(e).__name__}: {e}") from None
        except BaseException:  # such as the caller's deadline: the zygote is in the middle of a job
            self.close()
            raise
        if not function or result.end is not End.OK:
            return result
        returned = _decode_frames(result.output)
        if returned is None or len(returned) != len(given):
            return Result(End.RAISED, result.output)
        return Result(End.OK, result.output, returned)

    def _run(self, program: str, data: bytes, limits: Limits, function: str) -> Result:
        assert self._socket is not None
        self._num_jobs += 1
        job = {
            "id": self._num_jobs,
            "function": function,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
        }
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        with contextlib.ExitStack() as ours:
            ours.callback(os.close, read_end)
            with contextlib.ExitStack() as theirs:
                theirs.callback(os.close, write_end)
                files = [
                    _read_only_file(content, theirs)
                    for content in (program.encode("utf-8", "replace"), data)
                ]
                descriptors = array.array("i", [*files, write_end])
                self._socket.sendmsg(
                    [json.dumps(job).encode()],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
                )
            output, report = self._collect(read_end, limits)
        if report["id"] != self._num_jobs:
            raise ValueError(f"a report on job {report['id']}, not {self._num_jobs}")
        return _result(output, report, limits)

    def _collect(self, read_end: int, limits: Limits) -> tuple[bytes, dict[str, Any]]:
        """Returns the program's output and the zygote's report."""
        assert self._socket is not None
        output, report = bytearray(), None
        deadline = time.monotonic() + limits.wall_s + GRACE_S
        is_open = True

        def read() -> bool:
            """Returns whether more output may come."""
            chunk = os.read(read_end, 1 << 16)
            output.extend(chunk)
            return bool(chunk) and len(output) <= limits.output_bytes

        while report is None:
            sources = [self._socket.fileno(), *([read_end] if is_open else [])]
            ready = _readable(sources, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the zygote did not report how the program ended")
            if read_end in ready:
                is_open = read()
                if len(output) > limits.output_bytes:
                    self._socket.send(b"kill")
            if self._socket.fileno() in ready:
                report = json.loads(self._socket.recv(1 << 12))
        # the write end may still be open elsewhere, so never block
        while is_open and _readable([read_end], 0.0):
            is_open = read()
        return bytes(output), report

    def _last_stderr_line(self) -> str:
        if self._zygote is None or self._zygote.stderr is None:
            return ""
        _kill_all(self._zygote)
        lines = self._zygote.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "no error output"


def _readable(descriptors: list[int], timeout_s: float) -> list[int]:
    """Returns those that can be read. select() would refuse numbers from 1024 on."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(math.ceil(1000 * timeout_s))]


def _kill_all(zygote: subprocess.Popen[bytes]) -> None:
    """Kills the zygote's session: also its children, if the interpreter is a script."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(zygote.pid, signal.SIGKILL)


def _library_folders(python: str) -> list[str]:
    """Returns the folders a program may read: libraries of the system, interpreter and its venv."""
    real = Path(os.path.realpath(python))
    prefixes = {Path("/usr"), Path(python).parent.parent, real.parent.parent}
    folders = [prefix / name for prefix in prefixes for name in ("lib", "lib64", "share/zoneinfo")]
    return sorted(str(folder) for folder in folders if folder.is_dir())


_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def _read_only_file(content: bytes, opened: contextlib.ExitStack) -> int:
    """Returns a read-only descriptor of a sealed in-memory file; `opened` closes it.

    Nothing can write to it, even if it is opened again through /proc/self/fd.
    """
    writable = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(writable), "wb") as file:
            file.write(content)
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
        readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)
    opened.callback(os.close, readable)
    return readable


def _result(output: bytes, report: dict[str, Any], limits: Limits) -> Result:
    if not report["confined"]:
        raise ValueError("the zygote could not confine the program")
    status = int(report["status"])
    if len(output) > limits.output_bytes:
        return Result(End.OUTPUT, b"")
    if report["too_long"]:
        return Result(End.TIME, b"")
    if os.WIFSIGNALED(status):
        ends: dict[int, End] = {
            signal.SIGXCPU: End.TIME,
            signal.SIGXFSZ: End.OUTPUT,
            signal.SIGSYS: End.FORBIDDEN,
        }
        return Result(ends.get(os.WTERMSIG(status), End.KILLED), b"")
    by_code = {0: End.OK, OUT_OF_MEMORY_CODE: End.MEMORY}
    return Result(by_code.get(os.WEXITSTATUS(status), End.RAISED), output)


def _decode_frames(output: bytes) -> list[Any] | None:
    """Returns the JSON values of length-prefixed frames (program.run_calls), None if malformed."""
    values, offset = [], 0
    try:
        while offset < len(output):
            (size,) = struct.unpack_from("<I", output, offset)
            offset += 4 + size
            if offset > len(output):
                return None
            values.append(json.loads(output[offset - size : offset]))
    except (struct.error, ValueError, RecursionError):
        return None
    return values
