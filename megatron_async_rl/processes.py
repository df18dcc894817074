"""Starts and ends processes: child processes, one error line, exit codes, no orphan process.

A child dies with its parent: it asks the kernel for SIGKILL as parent-death signal, which also ends
a process stuck in a collective. A parent that died before the child could ask is noticed by walking
up the parents to the launcher. Each child has a process group of its own: stopping it stops all it
started, and Ctrl-C on a terminal reaches only the launcher.

Slurm sends SIGTERM to every process of a job at once. Processes that must not end before their work
is saved cannot tell who sent it, so they block SIGTERM from the start: torchrun, SGLang, and all
their children (`sigterm_blocked`). Only SIGKILL stops those.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from megatron_async_rl import patches
from megatron_async_rl.errors import ConfigError, Error, Preempted

EXIT_REQUEUE = 75  # preempted, state saved: run it again (Slurm: requeue on this code)
EXIT_ERROR = 2  # an Error with a message; any other non-zero code is a crash
LAUNCHER_VARIABLE = "MEGATRON_ASYNC_RL_LAUNCHER"  # pid of our first process on this host, inherited
LOG_END_BYTES = 1 << 18  # a log of weeks has gigabytes
TEMPORARY_PREFIX = "marl-"
MAX_TMPDIR = 60  # bytes; multiprocessing makes sockets of 46 more below it
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main(run: Callable[[], None], unwind: bool = True) -> NoReturn:
    """Runs the body of a process: logs to stderr, prints stacks on SIGUSR2, ends by exit codes.

    With `unwind`, SIGTERM runs finally blocks, which stop children. Without, only a SIGTERM of the
    parent counts and ends the process at once, and so does the return of `run`, without finalizers.
    """
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if unwind:
        signal.signal(signal.SIGTERM, _exit_in_order)
    else:
        _obey_only_parent()
    logging.basicConfig(
        level=os.environ.get("MEGATRON_ASYNC_RL_LOG", "INFO"),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    try:
        run()
    except Preempted as e:
        logging.getLogger(__name__).warning("%s", e)
        sys.exit(EXIT_REQUEUE)
    except Error as e:
        logging.getLogger(__name__).debug("", exc_info=True)
        # indented, so that error_text finds all lines
        sys.stderr.write("error: " + str(e).replace("\n", "\n  ") + "\n")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if not unwind:  # gloo's threads can abort the interpreter while it finalizes
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


def _exit_in_order(signum: int, frame: object) -> None:
    sys.exit(128 + signum)  # unwinds: finally blocks stop children


def _obey_only_parent() -> None:
    """Ends a trainer rank on torchrun's SIGTERM, but not on the one Slurm sends to the job."""
    patches.apply("blocked_sigterm")
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # later threads and children inherit it

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=listen, name="sigterm", daemon=True).start()


def die_with_parent(parent: int = 0) -> None:
    """Makes the kernel kill this process when its parent (the thread that started it) ends.

    Ends the process here if the parent has ended already. `parent`: its pid, if known.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, "0"))
    if (parent and os.getppid() != parent) or not _is_descendant_of(launcher):
        os._exit(128 + signal.SIGKILL)


def make_forks_die_with_parent() -> None:
    """Applies die_with_parent to every later fork of this process, also those made by libraries."""
    os.register_at_fork(after_in_child=die_with_parent)


def _is_descendant_of(launcher: int) -> bool:
    """Walks up the parents of this process; true if there is no launcher (0)."""
    pid = os.getpid()
    while pid not in (0, launcher):
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False  # this parent has just ended
    return pid == launcher


class _SigtermBlocked(subprocess.Popen[bytes]):
    """A child with SIGTERM blocked, in it and in all that it starts."""


def start(
    command: list[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    sigterm_blocked: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a child in its own process group, with its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()
    variables = {LAUNCHER_VARIABLE: str(parent), **os.environ, **(env or {})}
    if temporary := variables.get("TMPDIR"):
        _keep_temporary(Path(temporary))

    def new_group_and_die_with_parent() -> None:
        os.setpgid(0, 0)
        if sigterm_blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        die_with_parent(parent)

    with log.open("ab") as output:
        return (_SigtermBlocked if sigterm_blocked else subprocess.Popen)(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=cwd,
            preexec_fn=new_group_and_die_with_parent,
        )


def stop(children: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Sends SIGTERM to each child's process group, and SIGKILL to the rest after `grace_s`.

    Groups with SIGTERM blocked get SIGKILL at once.
    """
    children = list(children)
    for child in children:
        blocked = isinstance(child, _SigtermBlocked)
        _signal_group(child, signal.SIGKILL if blocked else signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(_group_is_alive(child) for child in children):
        time.sleep(0.05)
    for child in children:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def temporary_parent() -> str:
    """Returns TMPDIR. Raises ConfigError if its path leaves no room for the names below it."""
    parent = tempfile.gettempdir()
    if (length := len(os.fsencode(parent))) >= MAX_TMPDIR:
        raise ConfigError(
            f"TMPDIR = {parent} has {length} bytes, must have less than {MAX_TMPDIR}: Unix sockets "
            "are made in it",
            "set TMPDIR to a short path of this host, such as /tmp",
        )
    return parent


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Makes a folder for temporary files of children; it is removed even if this process is killed.

    torchrun, multiprocessing and SGLang leave folders and sockets in TMPDIR. run.dir is unsuitable
    for them: the path of a socket has at most 107 bytes, and a shared disk may refuse sockets.
    The folder is locked: systemd-tmpfiles, which removes what is older than ten days, skips it.
    Raises ConfigError as temporary_parent.
    """
    folder, owner = tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=temporary_parent()), os.getpid()
    # for a kill of this process, which closes the pipe; others that die with it may still write
    script = 'trap "" INT TERM HUP; cat; rm -rf "$0" || { sleep 1; rm -rf "$0"; }'
    remover = subprocess.Popen(
        ["/bin/sh", "-c", script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        yield Path(folder)
    finally:
        os.close(lock)
        if os.getpid() == owner:  # a fork of multiprocessing drops its finalizers
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(remover.pid, signal.SIGKILL)  # it may be stopped
            remover.communicate()


def _keep_temporary(folder: Path) -> None:
    """Makes a folder of `temporary_folder` again if a cleaner of /tmp has removed it.

    Raises PermissionError if another user has made it since: children trust the sockets in it.
    """
    if not folder.name.startswith(TEMPORARY_PREFIX):
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "another user has made this folder", str(folder))


def temporary_environment(folder: Path) -> dict[str, str]:
    """Returns the variables with which a child writes its temporary files into `folder`.

    The cache of torch.compile stays where later runs find it.
    """
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    return {
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
    }


def is_ours(pid: int) -> bool:
    """Returns whether the pid is a process of this package on this host: pids are used again."""
    try:
        return b"megatron_async_rl" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def python_path() -> str:
    """Returns PYTHONPATH for our child processes: this checkout first."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def _signal_group(child: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signum)
        if signum == signal.SIGTERM:
            os.killpg(child.pid, signal.SIGCONT)  # a suspended process gets it when it continues


def _group_is_alive(child: subprocess.Popen[bytes]) -> bool:
    child.poll()  # reaps it; a zombie would keep the group alive
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def log_size(log: Path) -> int:
    """Returns the bytes of a log, 0 if there is none: what is written later begins there."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def log_end(log: Path, begin: int = 0) -> list[str]:
    """Returns the last lines of a log, of at most LOG_END_BYTES, none written before `begin`.

    A log that is shorter than `begin` was rotated: its first line is later.
    """
    try:
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = begin if begin <= size else 0
            file.seek(max(begin, size - LOG_END_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def error_text(log: Path, begin: int = 0) -> str | None:
    """Returns the last `error: ...` of `log_end` with its indented lines; None if there is none."""
    lines = log_end(log, begin)
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return None
    first, *rest = lines[starts[-1] :]
    below = itertools.takewhile(lambda line: line.startswith("  "), rest)
    return "\n".join([first.removeprefix("error: "), *(line[2:] for line in below)])
