"""Every process that SGLang spawns dies with the one that spawned it, from its first instant on.

Python imports this file at its start, long before SGLang's own code asks for the same: SGLang imports for seconds first, and
a scheduler whose server is killed in that time goes on alone and keeps its GPU.

And SIGTERM stays blocked in all of them, as the worker that starts the server asks for (Slurm signals every process of a
job, and the requests under way must still come back). Python would unblock it where it starts its resource tracker, and
where it ends it would wait for ever for children that it has sent SIGTERM: they are killed.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if any("multiprocessing.spawn" in argument for argument in sys.orig_argv):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(128 + signal.SIGKILL)

if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
    from multiprocessing import popen_fork, resource_tracker

    resource_tracker._IGNORED_SIGNALS = (signal.SIGINT,)
    popen_fork.Popen.terminate = popen_fork.Popen.kill
