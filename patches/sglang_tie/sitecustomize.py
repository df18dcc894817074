"""Every process that SGLang spawns dies with the one that spawned it, from its first instant on.

Python imports this file at its start, long before SGLang's own code asks for the same: SGLang imports for seconds first, and
a scheduler whose server is killed in that time goes on alone and keeps its GPU.

And SIGTERM stays blocked in all of them, as the worker that starts the server asks for (Slurm signals every process of a
job, and the requests under way must still come back). Python would unblock it where it starts its resource tracker, and
where it ends it would wait for ever for children that it has sent SIGTERM: they are killed.

The TCPStore of SGLang's own ranks listens on the address that the ranks are given (loopback for one host) instead of on
every address of the host: torch has the argument (`master_listen_fd`), SGLang does not pass it.
"""

import ctypes
import importlib.abc
import importlib.util
import os
import signal
import socket
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


class _BindStores(importlib.abc.MetaPathFinder):
    """Replaces TCPStore in torch.distributed.rendezvous when that is imported; importing torch here would cost seconds."""

    MODULE = "torch.distributed.rendezvous"

    def find_spec(self, name, path=None, target=None):
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.TCPStore = _bound(module.TCPStore)

        spec.loader.exec_module = exec_module
        return spec


def _bound(store):
    """Returns a constructor of `store` whose server listens on its own host name only."""

    def make(host_name, port, world_size=None, is_master=False, *args, **kwargs):
        if not is_master or args or not kwargs.get("use_libuv", True):
            return store(host_name, port, world_size, is_master, *args, **kwargs)
        family, _, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            port = listener.getsockname()[1]
            made = store(
                host_name, port, world_size, True, master_listen_fd=listener.fileno(), **kwargs
            )
            listener.detach()  # the store closes it
        return made

    return make


sys.meta_path.insert(0, _BindStores())
