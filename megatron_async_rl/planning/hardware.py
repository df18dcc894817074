"""The constants of GPUs and engines that analytic costs use, each with its source.

One set for all models and workloads. docs/planning.md names the measurement of each constant;
docs/results/2026-11-plan.md keeps these measurements apart from predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_async_rl.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links; rates per second, links per direction."""

    name: str
    memory_bytes: float
    hbm_bytes: float
    matrix_flops: float  # of large bf16 products
    nvlink_bytes: float
    nic_bytes: float


GPUS = {
    # HBM: datasheet. Matrix rate: 770 to 810 TFLOP/s measured on H200, the same chip
    # (docs/results/2026-11-trainer.md). NIC: 400 Gb/s for each GPU.
    "h100": Gpu("H100 SXM 80 GB", 80e9, 3.35e12, 790e12, 450e9, 50e9),
    # HBM: measured copy
    "h200": Gpu("H200 SXM 141 GB", 141e9, 4.3e12, 790e12, 450e9, 50e9),
    # as H100, with NVLink of 400 GB/s in both directions together
    "h800": Gpu("H800 SXM 80 GB", 80e9, 3.35e12, 790e12, 200e9, 50e9),
}


@dataclass(frozen=True)
class Engine:
    """Efficiencies of decoding, and the other costs of a decode step."""

    layer_s: float = 72e-6  # of each layer, however small the batch
    tensor_parallel_layer_s: float = 5e-6  # more with sglang.tp_size > 1
    weight_share: float = 0.947  # of HBM bandwidth, reading weights
    kv_share: float = 0.87  # of HBM bandwidth, reading the KV cache
    matrix_share: float = 0.96  # of the matrix rate
    sample_s: float = 0.0  # of each sample in the batch
    prefill_attention_flops: float = 389e12


# Fit to public inter-token latencies of vLLM on H100, bf16, dense models of 8B to 32B
# (ml-energy/leaderboard, commit 0cd52da): 22 points, mean error 2.6 %, largest 13 %. It gives 47 us
# for each sample, which an 8B model on SGLang 0.5.21 does not show: 256 samples, 16,681 tokens/s
# on H200 (docs/results/2026-11-weights.md) are 15.3 ms a step, and the other terms are 15.2 ms.
SGLANG = Engine()
# Without the overlap schedule: 13,870 tokens/s in the same measurement.
SGLANG_NO_OVERLAP = Engine(sample_s=12e-6)
# As vLLM in that fit; for versions of SGLang without the overlap schedule's gains (0.4).
OLDER_ENGINE = Engine(sample_s=47e-6)

# The same fit for mixture-of-experts models of the same data set, mean error 11 %.
EXPERTS_WEIGHT_SHARE, EXPERTS_MATRIX_SHARE = 0.73, 0.41

# Triton attention of SGLang has no Hopper kernel: from the 430k tokens that 1.7B prefills in 5.5 s
# after an update (docs/planning.md).
TRITON_PREFILL_ATTENTION_FLOPS = 64e12

# The trainer, from docs/results/2026-11-trainer.md (8B with 12 layers at TP 1: matrix products take
# 59 % of a step, attention 29 %, the rest 12 %).
TRAIN_MATRIX_SHARE = 0.92
TRAIN_ATTENTION_FLOPS = 389e12
TRAIN_BYTES = 430.0  # of memory traffic for each token, layer and hidden unit, forward and backward
HBM_SHARE = 0.9  # of HBM bandwidth, copying
LAYER_LAUNCH_S = 6.4e-3  # least time of a layer in a micro-batch: the CPU launches its kernels
TENSOR_PARALLEL_BYTES_S = 125e9  # NCCL takes 15 % of a step at TP 2
PACKING = 0.93  # of the token budget of a micro-batch, in the middle of the measured range
OPTIMIZER_BYTES = 40.0  # read and written for each parameter: gradients, moments, weights

# Weight updates: 64 % of a plain broadcast of 370 GB/s over NVLink, and 0.05 s beside it
# (docs/results/2026-11-weights.md). The share over a NIC is assumed to be the same.
UPDATE_FIXED_S, UPDATE_SHARE, BROADCAST_SHARE = 0.05, 0.64, 0.82


def gpu(name: str) -> Gpu:
    """Returns the entry of the table. Raises ConfigError if there is none."""
    if name in GPUS:
        return GPUS[name]
    raise ConfigError(
        f"--gpu = {name} is not in the table of planning/hardware.py",
        f"give one of {', '.join(GPUS)}, or take costs from a run with --calibrate",
    )
