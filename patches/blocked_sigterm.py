"""Lets a process that blocks SIGTERM use multiprocessing: call `install()` at its start.

Slurm sends SIGTERM to every process of a job. The trainer ranks and the SGLang server block it, so
that work in progress can still be saved or returned. The standard library assumes that it is not
blocked, in two places. A second call of `install()` does nothing.
"""

import signal
from multiprocessing import popen_fork, resource_tracker


def install():
    """Replaces two names of multiprocessing in this process."""
    # On its start the resource tracker would unblock SIGTERM in this process.
    resource_tracker._IGNORED_SIGNALS = (signal.SIGINT,)
    # At exit multiprocessing terminates daemonic children with SIGTERM, which they inherit blocked,
    # and then joins them: that join would never return.
    popen_fork.Popen.terminate = popen_fork.Popen.kill
