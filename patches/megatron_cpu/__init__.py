"""Lets an unmodified megatron-core (0.16.1, 0.19.2) run on CPU and gloo.

Call `install()` before the first import of megatron.core.

| patch       | effect                                                               | needed    |
|-------------|----------------------------------------------------------------------|-----------|
| triton_leaf | replaces the module that imports triton unconditionally              | no triton |
| router_gemm | defines a name that the MoE router reads after a failed import       | no TE     |
| latent_te   | latent attention asks for TE's classes only where TE is              | no TE     |
| torch_cuda  | torch.cuda.{current_device, Stream, ...}, Tensor.cuda answer for CPU | no CUDA   |
| rng_tracker | the CUDA RNG tracker forks torch's CPU generator                     | no CUDA   |
| moe_splits  | split sizes of the MoE all-to-all become numpy on a CPU too          | no CUDA   |
| cp_angles   | YaRN takes the angles of a context-parallel rank without pinning     | no CUDA   |
| uneven_tp   | gathers and scatters unevenly split tokens of expert TP over gloo    | no CUDA   |
| gloo_device | all gloo groups of a process share one device and its thread         | no CUDA   |
| retarget    | constants 'cuda', 'torch.cuda.FloatTensor' of listed functions       | no CUDA   |

Each patch checks that the code it replaces is still there and raises DriftError otherwise, so a new
megatron-core stops the run at its start. With CUDA, triton and TE no patch applies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from patch_checks import DriftError, core_module, require

from megatron_cpu import gloo_device

_installed = False


def install() -> None:
    """Applies the patches that this machine needs; a second call does nothing."""
    global _installed
    if _installed:
        return
    if not torch.cuda.is_available():
        # jit_fuser is torch.compile: on a CPU inductor costs about 10 s per process and gains
        # nothing. torch._dynamo reads this variable on its first import, by megatron.core.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _triton_leaf()
    # megatron-core warns of every optional package that is missing, and torch of its calls.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Before torch_cuda: this import builds torch._dynamo's tables of torch.cuda functions,
        # which refuse the replacements.
        importlib.import_module("megatron.core")
    _router_gemm()
    _latent_te()
    if not torch.cuda.is_available():
        _torch_cuda()
        _rng_tracker()
        _moe_splits()
        _cp_angles()
        _uneven_tp()
        gloo_device.install()
        _retarget()
    _installed = True


# ---- without triton or Transformer Engine, on GPU and CPU ----


def _triton_leaf() -> None:
    """Replaces the module of GPU kernels (MoE paged stash) in which 0.18 and later import triton.

    A fake `triton` package instead would break torch._inductor, which probes triton.backends.
    """
    leaf = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is not None or leaf in sys.modules:
        return

    def gpu_only(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("MoE paged stash needs triton and a GPU")

    module = types.ModuleType(leaf)
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = module.paged_stash_pop_kernel = gpu_only
    sys.modules[leaf] = module


def _router_gemm() -> None:
    """Defines te_general_gemm, which 0.16.1 without TE leaves undefined and the router reads."""
    moe_utils = core_module("transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _latent_te() -> None:
    """Corrects HAVE_TE, which 0.16.1 sets without TE; TELinear is then a mock, not a class."""
    module = core_module("transformer.multi_latent_attention")
    require(module, "HAVE_TE", "TELinear")
    module.HAVE_TE = module.HAVE_TE and isinstance(module.TELinear, type)


# ---- without CUDA ----


class _Stream:
    """A stream or event that is always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> bool:
        return False

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def synchronize(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = record = wait = synchronize


def _returning(value: Any) -> Callable[..., Any]:
    """Returns a new constant function: torch._dynamo refuses one object under two names."""
    return lambda *args, **kwargs: value


def _torch_cuda() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": _returning(torch.device("cpu")),
        "current_stream": _returning(stream),
        "default_stream": _returning(stream),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "memory_stats": _returning({}),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "FloatTensor": lambda data: torch.tensor(data, dtype=torch.float32),
        "IntTensor": lambda data: torch.tensor(data, dtype=torch.int32),
        "LongTensor": lambda data: torch.tensor(data, dtype=torch.int64),
    }
    replacements |= {
        name: _returning(None)
        for name in ("set_device", "synchronize", "empty_cache", "set_stream")
    }
    replacements |= {
        name: _returning(0)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")
    }
    require(torch.cuda, *replacements)
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.nvtx.range_push = _returning(None)
    torch.cuda.nvtx.range_pop = _returning(None)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _rng_tracker() -> None:
    random = core_module("tensor_parallel.random")
    require(random, "_get_cuda_rng_state", "_set_cuda_rng_state", "CudaRNGStatesTracker")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(
        new_state
    )
    # fork() warns when the CPU generator advances, which is the purpose here.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _moe_splits() -> None:
    """Converts split sizes to numpy on a CPU too: gloo's all-to-all refuses tensors."""
    dispatcher = core_module("transformer.moe.token_dispatcher")
    require(dispatcher, "maybe_move_tensor_to_cpu")
    original = dispatcher.maybe_move_tensor_to_cpu

    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return (
            tensor.numpy()
            if as_numpy and torch.is_tensor(tensor)
            else original(tensor, as_numpy, record_stream)
        )

    dispatcher.maybe_move_tensor_to_cpu = to_numpy


def _cp_angles() -> None:
    """Picks the two chunks of rotary angles that a context-parallel rank holds.

    Megatron's function copies their numbers through pinned memory.
    """
    module = core_module("models.common.embeddings.yarn_rotary_pos_embedding")
    require(module, "get_pos_emb_on_this_cp_rank")

    def angles_of_rank(angles: torch.Tensor, dimension: int, group: Any) -> torch.Tensor:
        chunks = angles.chunk(2 * group.size(), dimension)
        own = (chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()])
        return torch.cat(own, dimension)

    module.get_pos_emb_on_this_cp_rank = angles_of_rank


def _uneven_tp() -> None:
    """gloo needs equal sizes on all ranks; with expert TP each has another number of tokens."""
    mappings = core_module("tensor_parallel.mappings")
    require(mappings, "_gather_along_first_dim", "_reduce_scatter_along_first_dim")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, None, use_global_buffer)
        padded = x.new_zeros(max(output_split_sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    def scatter_uneven(
        x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(x, group, None, use_global_buffer)
        summed = x.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = scatter_uneven


_CPU_CONSTANTS = {"cuda": "cpu"} | {
    f"torch.cuda.{name}": f"torch.{name}"
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor")
}

# Module below megatron.core -> functions with constants to replace. '?' marks functions that
# not every supported version has; any other must exist and hold at least one such constant.
_RETARGETED = {
    "optimizer.clip_grads": [
        "get_grad_norm_fp32",
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
    ],
    "optimizer.optimizer": [
        "MixedPrecisionOptimizer.__init__",
        "FP32Optimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "?MegatronOptimizer.has_grad_norm_group",
    ],
    "optimizer.distrib_optimizer": [
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ],
    "optimizer.grad_scaler": ["MegatronGradScaler.__init__", "DynamicGradScaler.__init__"],
    "utils": ["local_multi_tensor_l2_norm"],
    "pipeline_parallel.schedules": [
        "forward_step",
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ],
    "transformer.utils": ["get_default_causal_mask", "get_sliding_window_causal_mask"],
    "tensor_parallel.data": ["_build_key_size_numel_dictionaries"],
    "dist_checkpointing.exchange_utils": [
        "exchange_loaded_tensors_gather_rounds",
        "_get_empty_tensor_for_exchange",
    ],
    "dist_checkpointing.strategies.state_dict_saver": ["verify_global_md_reuse"],
    "transformer.moe.token_dispatcher": ["MoEAlltoAllTokenDispatcher.__init__"],
    "transformer.moe.moe_utils": ["?track_moe_metrics"],
}


def _retarget() -> None:
    seen: set[types.FunctionType] = set()  # two names may be one function
    for module_name, names in _RETARGETED.items():
        module = core_module(module_name)
        for name in names:
            optional, name = name.startswith("?"), name.lstrip("?")
            function = _function(module, name)
            if function is None:
                if not optional:
                    raise DriftError(f"megatron.core.{module_name}.{name} is gone")
                continue
            code, swapped = _swap_constants(function.__code__)
            if not swapped and not optional and function not in seen:
                raise DriftError(
                    f"megatron.core.{module_name}.{name} holds no 'cuda' constant any more"
                )
            function.__code__ = code
            seen.add(function)


def _function(module: types.ModuleType, dotted: str) -> types.FunctionType | None:
    found: Any = module
    for part in dotted.split("."):
        try:
            found = inspect.getattr_static(found, part)
        except AttributeError:
            return None
    return inspect.unwrap(
        found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    )


def _swap_constants(code: types.CodeType) -> tuple[types.CodeType, int]:
    """Returns the code with CPU constants, also in nested functions, and the number replaced."""
    swapped = 0

    def swap(constant: Any) -> Any:
        nonlocal swapped
        if isinstance(constant, str) and constant in _CPU_CONSTANTS:
            swapped += 1
            return _CPU_CONSTANTS[constant]
        if type(constant) is tuple:
            return tuple(map(swap, constant))
        if isinstance(constant, types.CodeType):
            constant, inner = _swap_constants(constant)
            swapped += inner
        return constant

    return code.replace(co_consts=tuple(map(swap, code.co_consts))), swapped
