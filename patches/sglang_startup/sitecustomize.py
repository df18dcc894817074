"""Runs at the start of every Python process of the SGLang server (imported for its name).

Parent death: each process that SGLang spawns asks the kernel to be killed with its parent. SGLang
asks for the same, but only after seconds of imports: if the server is killed in that time, the
scheduler would keep running and hold its GPU memory.

SIGTERM: stays blocked in all of these processes, as the rollout worker that starts the server
requests (blocked_sigterm.py).

TCPStore: the store of SGLang's ranks listens on the address that the ranks are given (loopback on
one host) instead of on all addresses. torch has an argument for it, which SGLang does not pass.

Weight checker: its digests are of the bytes of fp8 weights and scales. SGLang hashes their products
in bfloat16, which hides changes of a scale and needs several times the memory of the weight.

Dummy weights: no random scales of the KV cache, by which attention would multiply from then on.
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


class _AtImport(importlib.abc.MetaPathFinder):
    """Changes a module when it is imported (torch and SGLang take seconds)."""

    def __init__(self, name, change):
        self._name = name
        self._change = change

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._change(module)

        spec.loader.exec_module = exec_module
        return spec


def _bind_stores(rendezvous):
    rendezvous.TCPStore = _bound(rendezvous.TCPStore)


def _hash_bytes(weight_checker):
    """Without a class that dequantizes a layer, the checker hashes all its tensors as they are."""
    weight_checker.select_comparable_weight = lambda quant_method: None


def _leave_kv_scales(weight_utils):
    initialize = weight_utils.initialize_dummy_weights

    def initialize_dummy_weights(model, *args, **kwargs):
        initialize(model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if name.endswith((".k_scale", ".v_scale")):
                parameter.data.fill_(-1.0)  # as before, which SGLang then makes 1

    weight_utils.initialize_dummy_weights = initialize_dummy_weights


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


sys.meta_path.insert(0, _AtImport("torch.distributed.rendezvous", _bind_stores))
sys.meta_path.insert(0, _AtImport("sglang.srt.utils.weight_checker", _hash_bytes))
sys.meta_path.insert(0, _AtImport("sglang.srt.model_loader.weight_utils", _leave_kv_scales))
