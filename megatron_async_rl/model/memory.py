"""Estimates GPU memory from the configuration and config.json: `doctor CONFIG`, `slurm --plan`.

Of a trainer rank, the largest of the pipeline: weights, gradients, optimizer state, activations of
the micro-batches in flight, logits. Left out: the CUDA context, NCCL's buffers and fragmentation.
docs/memory.md compares it with measured peaks; pipelines, data parallelism and context
parallelism were not measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, dataclass

from megatron_async_rl.config.config import Config
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.model.engine import block_fp8
from megatron_async_rl.model.layout import Layout
from megatron_async_rl.model.shape import ModelShape

GIB = 1 << 30
_GRADIENT, _MOMENTS, _MASTER = 4, 8, 4  # bytes of a parameter: fp32, Adam's two, fp32 copy


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    reference: float  # and the critic
    activations: float
    logits: float

    @property
    def peak(self) -> float:
        return sum(astuple(self))


@dataclass(frozen=True)
class ServerMemory:
    """Bytes of one GPU of a server."""

    weights: float
    kv_per_token: float


def trainer_memory(config: Config, hf: HfConfig) -> TrainerMemory:
    """Returns the estimate for the rank that needs most."""
    shape, layout = hf.shape(), Layout.from_config(config)
    stages = [_stage(stage, config, hf, shape, layout) for stage in range(layout.pp)]
    return max(stages, key=lambda memory: memory.peak)


def server_memory(config: Config, hf: HfConfig) -> ServerMemory:
    """Returns weights and KV cache of a server's GPU; SGLang replicates KV heads beyond their
    number."""
    shape, tp = hf.shape(), config.engine_tp
    num_bytes = 4 if config.sglang.get("dtype") == "float32" else 2
    dense, experts = layer_parameters(shape)
    per_layer = dense + experts * shape.num_experts
    vocabulary = vocabulary_parameters(shape) * (1 if shape.tied else 2)
    # a router stays as it is, but is small
    layer_bytes = 1 + 4 / block_fp8.BLOCK**2 if config.sends_fp8 else num_bytes
    weights = shape.num_layers * per_layer * layer_bytes + vocabulary * num_bytes
    return ServerMemory(weights / tp, shape.num_layers * shape.cached_per_token(tp) * num_bytes)


def summary(config: Config) -> list[str]:
    """Returns lines with the estimates.

    Raises DataError if config.json cannot be read, ConfigError if its layers cannot be split over
    the pipeline.
    """
    hf = HfConfig(config.model.path)
    lines = []
    if config.has_trainer:
        trainer = trainer_memory(config, hf)
        parts = [f"{name} {size / GIB:.1f}" for name, size in asdict(trainer).items() if size]
        lines.append(
            f"trainer: about {trainer.peak / GIB:.0f} GiB per GPU at the peak ({', '.join(parts)}),"
            " without CUDA context and NCCL"
        )
    server = server_memory(config, hf)
    fraction = config.sglang.get("mem_fraction_static")
    is_set = isinstance(fraction, int | float)
    share = f"; both together get {fraction:g} of the GPU" if is_set else ""
    lines.append(
        f"servers: {server.weights / GIB:.1f} GiB of weights per GPU, and "
        f"{server.kv_per_token * 1000 / GIB:.2f} GiB of KV cache per 1000 tokens{share}"
    )
    return lines


def _stage(
    stage: int, config: Config, hf: HfConfig, shape: ModelShape, layout: Layout
) -> TrainerMemory:
    num_layers = layout.stage_layers(shape.num_layers)[stage]
    is_last = stage == layout.pp - 1
    dense, experts = layer_parameters(shape)
    num_vocabulary = (stage == 0) + (is_last and not (shape.tied and layout.pp == 1))
    split = (num_layers * dense + num_vocabulary * vocabulary_parameters(shape)) / layout.tp
    expert = num_layers * experts * shape.num_experts / (layout.ep * layout.etp)
    parameters = split + expert
    stage_ranks = layout.tp * layout.cp * layout.dp
    sharded = split / (layout.cp * layout.dp)
    sharded += expert / (stage_ranks / (layout.ep * layout.etp))
    full = config.trainer.precision == "fp32"
    num_bytes = 4 if full else 2
    state = _MOMENTS + (0 if full else _MASTER)
    tokens = config.trainer.max_tokens_per_microbatch / layout.cp
    logits = 2 * num_bytes * tokens * shape.vocab_size / layout.tp if is_last else 0.0
    others = parameters * num_bytes if config.algorithm.kl.coef else 0.0
    if config.algorithm.advantage.uses_critic:
        others += parameters * (num_bytes + _GRADIENT) + sharded * state
    return TrainerMemory(
        weights=parameters * num_bytes,
        gradients=parameters * _GRADIENT,
        optimizer=sharded * state,
        reference=others,
        activations=num_bytes * tokens * _activations(stage, config, hf, shape, layout),
        logits=logits,
    )


def _activations(
    stage: int, config: Config, hf: HfConfig, shape: ModelShape, layout: Layout
) -> float:
    """Returns the elements that a stage saves for backward, per token of a micro-batch.

    The number of micro-batches in flight is that of 1F1B, and of its interleaved form
    (Korthikanti et al., arXiv 2205.05198, section 4.2.3).
    """
    num_layers = layout.stage_layers(shape.num_layers)[stage]
    splits_sequence = config.megatron.get("sequence_parallel") or shape.num_experts
    boundary = shape.hidden_size / (layout.tp if splits_sequence else 1)
    dims = shape.dims
    if shape.num_experts:
        top_k = hf.architecture().router_top_k
        mlp = top_k * (shape.hidden_size + 2 * shape.expert_ffn_hidden_size / layout.etp)
        mlp += 2 * shape.shared_ffn_hidden_size / layout.tp
    else:
        mlp = 2 * shape.ffn_hidden_size / layout.tp
    attention = 2 * (dims["q"] + dims["kv"])
    if shape.latent:  # values and output padded to the size of queries, the output cut, latents
        attention = 4 * dims["q"] + dims["v"] + dims["q_rank"] + dims["kv_latent"]
    if shape.linear:  # the results of all projections, and of the output's norm and gate
        attention = shape.attention_parameters // shape.hidden_size + 2 * dims["linear_v"]
    # both inputs, queries and keys before their norms, values, attention's output, gate and up
    saved = 2 * boundary + attention / layout.tp + mlp
    in_flight = float(layout.pp - stage)
    if layout.vpp > 1:
        in_flight = layout.pp * (1 + (layout.pp - 1) / (layout.pp * layout.vpp))
    is_last = stage == layout.pp - 1
    if config.megatron.get("recompute_granularity") != "full":
        return num_layers * saved * in_flight
    size = int(config.megatron.get("recompute_num_layers", 1))
    if config.megatron.get("recompute_method") == "block":
        recomputed = min(size, num_layers)
        per_microbatch, working = recomputed * boundary + (num_layers - recomputed) * saved, 1
    else:
        per_microbatch, working = math.ceil(num_layers / size) * boundary, size
    # the last stage recomputes its layers after the logits are gone
    return per_microbatch * in_flight + (0 if is_last else working * saved)


def layer_parameters(shape: ModelShape) -> tuple[int, int]:
    """Returns a layer's parameters without its experts, and those of one expert; norms are small.

    Without experts the second is 0. A few first layers without experts are taken for such with.
    """
    hidden, attention = shape.hidden_size, shape.attention_parameters
    if shape.num_experts:
        router = hidden * shape.num_experts
        shared = 3 * hidden * shape.shared_ffn_hidden_size
        return attention + router + shared, 3 * hidden * shape.expert_ffn_hidden_size
    return attention + 3 * hidden * shape.ffn_hidden_size, 0


def vocabulary_parameters(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size
