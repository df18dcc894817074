"""Replaces SGLang's kernel package, which has no CPU wheel (for SGLang 0.5.21).

With SGLANG_USE_CPU_ENGINE=1 SGLang imports the names below when its modules load, but calls them
only for features that we do not run on a CPU (speculative decoding). Each is a function that raises
when it is called. The forward pass needs no kernel of this package: SGLang uses plain torch code
where `torch.ops.sgl_kernel.convert_weight_packed` is missing.
"""

import torch

__version__ = "0.0.0"


def _not_on_cpu(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name}: this CPU replacement has no kernels (patches/README.md)"
        )

    kernel.__name__ = name
    return kernel


for _name in (
    "assign_extend_cache_locs_cpu",  # sglang/kernels/ops/speculative/cache_locs.py
    "assign_req_to_token_pool_cpu",  # sglang/srt/mem_cache/allocation.py
    "build_tree_kernel_efficient_cpu",  # sglang/srt/speculative/eagle_utils.py
    "copy_all_layer_kv_cache_cpu",  # sglang/kernels/ops/kvcache/cache_move.py
    "fill_accept_out_cache_loc_cpu",  # sglang/kernels/ops/speculative/eagle.py
    "fill_bonus_tokens_cpu",  # sglang/kernels/ops/speculative/eagle.py
    "verify_tree_greedy_cpu",  # sglang/srt/speculative/eagle_utils.py
):
    globals()[_name] = _not_on_cpu(_name)


# WeightChecker.checksum (sglang/srt/utils/weight_checker.py) calls torch.cuda.synchronize() on
# every device and so answers 400 "Torch not compiled with CUDA enabled". A CPU needs no wait.
if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda device=None: None
