"""Computes costs from the configuration, the model's sizes and the constants of hardware.py.

Decoding is additive: launches, weights, KV cache and matrix products of a step follow each other.
Training counts 6 FLOPs for each token and weight of a matrix product, and attention, at their
measured rates, and memory traffic between them. docs/planning.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import memory
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.flops import ModelFlops
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.shape import ModelShape
from megatron_async_rl.planning import hardware
from megatron_async_rl.planning.costs import Costs, DecodeCosts, PrefillCosts, TrainCosts
from megatron_async_rl.planning.hardware import Engine, Gpu

DEFAULT_STATIC_FRACTION = 0.85  # of GPU memory for weights and KV cache, as SGLang chooses
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of one model, by their use for a token."""

    flops: ModelFlops  # of which `weights` are those that a token is multiplied with
    total: float
    dense: float  # of `total`: not in experts
    expert_share: float  # of the experts that each token uses; 0 without experts
    kv_bytes: float  # of a token, on one of the server's GPUs
    layer_width: float  # layers * hidden size
    layers: int


def model_size(hf: HfConfig, engine_tp: int) -> ModelSize:
    shape = hf.shape()
    dense, expert = memory.layer_parameters(shape)
    vocabulary = memory.vocabulary_parameters(shape)
    top_k = hf.architecture().router_top_k if shape.num_experts else 0
    layers = shape.num_layers
    return ModelSize(
        flops=ModelFlops.of(shape, top_k),
        total=layers * (dense + expert * shape.num_experts) + vocabulary * (1 if shape.tied else 2),
        dense=layers * dense + vocabulary,
        expert_share=top_k / shape.num_experts if shape.num_experts else 0.0,
        kv_bytes=layers * shape.cached_per_token(engine_tp) * 2,
        layer_width=layers * shape.hidden_size,
        layers=layers,
    )


def costs(config: Config, hf: HfConfig, gpu: Gpu, engine: Engine | None = None) -> Costs:
    """Returns the costs of a run on such GPUs; `engine`: None uses the constants of SGLang 0.5."""
    size = model_size(hf, config.engine_tp)
    engine = engine or engine_of(config, size)
    return Costs(
        decode=decode_costs(config, size, gpu, engine),
        prefill=prefill_costs(config, size, gpu, engine),
        train=train_costs(config, hf.shape(), size, gpu),
        update_s=update_s(config, size, gpu),
        kv_tokens=kv_tokens(config, hf, gpu),
    )


def engine_of(config: Config, size: ModelSize) -> Engine:
    """Returns the constants for the settings under `sglang`."""
    sequential = config.sglang.get("disable_overlap_schedule")
    engine = hardware.SGLANG_NO_OVERLAP if sequential else hardware.SGLANG
    if size.expert_share:
        weight, matrix = hardware.EXPERTS_WEIGHT_SHARE, hardware.EXPERTS_MATRIX_SHARE
        engine = replace(engine, weight_share=weight, matrix_share=matrix)
    if config.sglang.get("attention_backend") == "triton":
        flops = hardware.TRITON_PREFILL_ATTENTION_FLOPS
        engine = replace(engine, prefill_attention_flops=flops)
    return engine


def decode_costs(config: Config, size: ModelSize, gpu: Gpu, engine: Engine) -> DecodeCosts:
    """Returns the additive costs of a decode step.

    Each step is assumed to read the experts that a batch of the configured size uses.
    """
    tp, batch = config.engine_tp, config.rollout.max_concurrent_samples
    touched = 1 - (1 - size.expert_share) ** batch if size.expert_share else 0.0
    read_bytes = 2 * (size.dense + (size.total - size.dense) * touched)
    layer_s = engine.layer_s + (engine.tensor_parallel_layer_s if tp > 1 else 0.0)
    products_s = 2 * size.flops.weights / (tp * engine.matrix_share * gpu.matrix_flops)
    return DecodeCosts(
        step_s=size.layers * layer_s + read_bytes / (tp * engine.weight_share * gpu.hbm_bytes),
        sample_s=engine.sample_s + products_s,
        context_token_s=size.kv_bytes / (engine.kv_share * gpu.hbm_bytes),
    )


def prefill_costs(config: Config, size: ModelSize, gpu: Gpu, engine: Engine) -> PrefillCosts:
    """Returns the costs of a forward pass: as the trainer's, with the engine's attention."""
    tp = config.engine_tp
    return PrefillCosts(
        token_s=_forward_backward_token_s(size, gpu) / 3 / tp,
        token_pair_s=2 * size.flops.attention_width / (tp * engine.prefill_attention_flops),
    )


def train_costs(config: Config, shape: ModelShape, size: ModelSize, gpu: Gpu) -> TrainCosts:
    """Returns the costs of a training step, by micro-batches of the configured token budget."""
    layout, algorithm = Layout.from_config(config), config.algorithm
    # micro-batches pass a pipeline at the pace of its largest stage
    stages = size.layers / max(layout.stage_layers(size.layers))
    split = layout.tp * stages * layout.cp
    recomputes = config.megatron.get("recompute_granularity") == "full"
    work = 4 / 3 if recomputes else 1.0
    work *= 2 if algorithm.advantage.uses_critic else 1  # the critic is as large
    token_s = work * _forward_backward_token_s(size, gpu) / split
    if layout.tp > 1:  # gathers and scatters of activations, eight in each layer
        moved = 8 * 2 * size.layer_width * (layout.tp - 1) / layout.tp
        token_s += moved / (stages * layout.cp * hardware.TENSOR_PARALLEL_BYTES_S)
    parameters = size.total / (layout.tp * stages * (layout.ep if size.expert_share else 1))
    replicas = layout.dp
    link = gpu.nvlink_bytes if config.trainer_ranks <= GPUS_PER_NODE else gpu.nic_bytes
    reduced_s = 6 * parameters * (replicas - 1) / replicas / (link * hardware.UPDATE_SHARE)
    optimizer_s = hardware.OPTIMIZER_BYTES * parameters / gpu.hbm_bytes / replicas
    return TrainCosts(
        token_s=token_s,
        token_pair_s=work
        * 6
        * size.flops.attention_width
        / (split * hardware.TRAIN_ATTENTION_FLOPS),
        microbatch_s=hardware.LAYER_LAUNCH_S * size.layers / stages,
        microbatch_tokens=config.trainer.max_tokens_per_microbatch * hardware.PACKING,
        minibatches=algorithm.minibatches,
        minibatch_s=optimizer_s + reduced_s,
        forward_passes=_forward_passes(config),
        replicas=replicas,
        pipeline_stages=1 + (layout.pp - 1) / layout.vpp,
    )


def update_s(config: Config, size: ModelSize, gpu: Gpu) -> float:
    """Returns the seconds of a weight update: every pipeline stage broadcasts its part."""
    stages = config.parallel_size("pipeline_model")
    num_gpus = config.trainer_ranks + config.rollout.servers * config.engine_tp
    link = gpu.nvlink_bytes * hardware.BROADCAST_SHARE
    if num_gpus > GPUS_PER_NODE:
        link = gpu.nic_bytes * stages
    return hardware.UPDATE_FIXED_S + 2 * size.total / (hardware.UPDATE_SHARE * link)


def kv_tokens(config: Config, hf: HfConfig, gpu: Gpu) -> float:
    """Returns the tokens that fit into a server's KV cache. Raises ConfigError if none does."""
    server = memory.server_memory(config, hf)
    fraction = float(config.sglang.get("mem_fraction_static", DEFAULT_STATIC_FRACTION))
    room = fraction * gpu.memory_bytes - server.weights
    if room < server.kv_per_token:
        raise ConfigError(
            f"sglang.tp_size = {config.engine_tp} leaves {server.weights / hardware.GIB:.0f} GiB "
            f"of weights on each GPU of a server, and {gpu.name} has "
            f"{fraction * gpu.memory_bytes / hardware.GIB:.0f} GiB for weights and KV cache",
            "raise sglang.tp_size",
        )
    if isinstance(limit := config.sglang.get("max_total_tokens"), int):
        return float(limit)
    return room / server.kv_per_token


def _forward_passes(config: Config) -> float:
    """Returns the passes over the batch before training: proximal and reference logprobs."""
    algorithm, correction = config.algorithm, config.algorithm.staleness_correction
    proximal = {
        "recompute": 1.0,
        "reuse_first_minibatch": 1 - 1 / algorithm.minibatches,
        "loglinear": 0.0,
    }[correction.proximal]
    reference = 1.0 if algorithm.kl.coef else 0.0
    return reference + (0.0 if algorithm.loss.objective == "ppo" else proximal)


def _forward_backward_token_s(size: ModelSize, gpu: Gpu) -> float:
    """Returns the seconds of a token on one GPU, without attention and communication."""
    products_s = 6 * size.flops.weights / (hardware.TRAIN_MATRIX_SHARE * gpu.matrix_flops)
    traffic = hardware.TRAIN_BYTES * size.layer_width
    return products_s + traffic / (hardware.HBM_SHARE * gpu.hbm_bytes)
