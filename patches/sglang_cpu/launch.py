"""Starts the stock SGLang server on a CPU: `python -m launch <arguments of sglang.launch_server>`.

SGLang starts its scheduler and detokenizer with the "spawn" method, so three processes each spend
8 CPU seconds on the same imports. A CPU engine has no CUDA context that a fork would break, so here
everything is imported once and the children are forked. Set OMP_NUM_THREADS=1 with it: a forked
child cannot use the threads of a pool that its parent started.
"""

import gc
import multiprocessing
import runpy

_set_start_method = multiprocessing.set_start_method
multiprocessing.set_start_method = lambda method, force=False: _set_start_method(
    "fork", force=force
)

gc.disable()  # collections during the imports find nothing and take a sixth of the time
import torch

# decorators would import torch's compiler, for 0.8 CPU seconds; on a CPU nothing is compiled
_compile = torch.compile
torch.compile = lambda function=None, **_: function or (lambda function: function)
import batched_attention
import block_fp8
import sglang.srt.entrypoints.http_server  # noqa: F401
import sglang.srt.mem_cache.pool_host.common as host_memory

torch.compile = _compile
gc.freeze()  # children share these pages
gc.enable()

batched_attention.register()
block_fp8.install()
# the buffer of enable_return_routed_experts is registered with CUDA, also on a CPU
host_memory._cuda_host_register = lambda buffer, granularity=None: None
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
