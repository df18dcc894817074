"""How a process of ours starts its children and how it ends: in order, with one error line, leaving nobody behind.

A child dies with its parent (the kernel's parent-death signal, SIGKILL: it works on a process that is stuck in a
collective), so even a killed launcher leaves no orphan. The signal is asked for by the child itself, which may be too
late: it then looks whether its line of parents still leads to the launcher, and ends otherwise. A child has a process
group of its own: stopping it stops what it started, and a terminal's Ctrl-C reaches the launcher alone.

Slurm signals every process of a job at once. So SIGTERM is blocked, from birth, in what must not end before its work is
saved and could not tell who sent it: torchrun, SGLang, and all below them. Only SIGKILL stops these (`deaf`).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from megatron_async_rl import patches
from megatron_async_rl.errors import Error, Preempted

EXIT_REQUEUE = 75  # told to end, saved: run it again (Slurm: --requeue, or requeue on this code)
EXIT_ERROR = 2  # an error with a message for people; anything else non-zero is a crash
LAUNCHER_VARIABLE = (
    "MEGATRON_ASYNC_RL_LAUNCHER"  # pid of the first of our processes on this host: all inherit it
)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main(run: Callable[[], None], unwind: bool = True) -> NoReturn:
    """Runs the body of a process: logging to stderr, stacks on SIGUSR2, an Error as one line and exit code 2.

    `unwind`: SIGTERM runs finally blocks, to stop children; without, it ends the process wherever it is if our parent sent
    it, and a body that has returned has closed what it opened: the process ends at once.
    """
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if unwind:
        signal.signal(signal.SIGTERM, _exit_in_order)
    else:
        _heed_the_parent_alone()
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
        sys.stderr.write(
            "error: " + str(e).replace("\n", "\n  ") + "\n"
        )  # error_text finds it again by the indent
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if (
        not unwind
    ):  # gloo's threads may abort an interpreter that takes itself apart, and all is done
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


def _exit_in_order(signum: int, frame: object) -> None:
    sys.exit(128 + signum)  # unwinds: finally blocks stop children


def _heed_the_parent_alone() -> None:
    """A rank that Slurm signals with the whole job must still save; torchrun's order to it must end it, stuck or not."""
    patches.apply("blocked_sigterm")
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # of all threads to come, and of what they start

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=listen, name="sigterm", daemon=True).start()


def die_with_parent(parent: int = 0) -> None:
    """The kernel kills this process when its parent ends (the very thread that started it). `parent`: its pid, if known.

    One whose parent has ended already ends here.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if (parent and os.getppid() != parent) or not _is_below(
        int(os.environ.get(LAUNCHER_VARIABLE, "0"))
    ):
        os._exit(128 + signal.SIGKILL)


def forks_die_with_us() -> None:
    """Also for whatever this process forks from here on, and for their forks: other people's libraries fork too."""
    os.register_at_fork(after_in_child=die_with_parent)


def _is_below(launcher: int) -> bool:
    """Whether our line of parents leads to that process; true where there is no launcher."""
    pid = os.getpid()
    while pid not in (0, launcher):
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False  # ended as we looked: so did everyone below it
    return pid == launcher


class _SigtermBlocked(subprocess.Popen[bytes]):
    """SIGTERM is blocked in it and in all that it starts."""


def start(
    command: list[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    sigterm_blocked: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a child in a process group of its own, its output appended to `log`. `deaf`: to SIGTERM, see above."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

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
            env={LAUNCHER_VARIABLE: str(parent), **os.environ, **(env or {})},
            cwd=cwd,
            preexec_fn=new_group_and_die_with_parent,
        )


def stop(children: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """SIGTERM to each child's process group, SIGKILL to what is left of the groups after `grace_s`, to deaf ones at once."""
    children = list(children)
    for child in children:
        _signal_group(
            child, signal.SIGKILL if isinstance(child, _SigtermBlocked) else signal.SIGTERM
        )
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(_group_lives(child) for child in children):
        time.sleep(0.05)
    for child in children:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signum)


def _group_lives(child: subprocess.Popen[bytes]) -> bool:
    child.poll()  # reaps it; a zombie would keep the group alive
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def error_text(log: Path) -> str | None:
    """The last `error: ...` that a process of ours wrote to its log, with the indented lines below it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return None
    first, *rest = lines[starts[-1] :]
    below = itertools.takewhile(lambda line: line.startswith("  "), rest)
    return "\n".join([first.removeprefix("error: "), *(line[2:] for line in below)])
