"""Runs at the start of every Python process of the SGLang server (imported for its name).

Parent death: each process that SGLang spawns asks the kernel to be killed with its parent. SGLang
asks for the same, but only after seconds of imports: if the server is killed in that time, the
scheduler would go on running and keep its GPU memory.

SIGTERM: stays blocked in all of these processes, as the rollout worker that starts the server
requests (blocked_sigterm.py).

TCPStore: the store of SGLang's ranks listens on the address that the ranks are given (loopback on
one host) instead of on all addresses. torch has an argument for it, which SGLang does not pass.
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
    if os.getppid() == 1:  # the parent has ended before the call
        os._exit(128 + signal.SIGKILL)

if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
    patches = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    sys.path.append(patches)
    import blocked_sigterm

    sys.path.remove(patches)
    blocked_sigterm.install()


class _BindStores(importlib.abc.MetaPathFinder):
    """Replaces TCPStore when torch.distributed.rendezvous is imported (torch takes seconds)."""

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
    """Returns a constructor of `store` that makes servers listen on their host name only."""

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
