"""Parallel layouts of trainer and servers, and the one set of rules for which models they fit.

Preflight, the trainer and `plan-weights` apply the same rules, each with the same message.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.engine import block_fp8
from megatron_async_rl.model.engine.engine_layout import VOCABULARY_MULTIPLE
from megatron_async_rl.model.pipeline_split import PipelineSplit
from megatron_async_rl.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The trainer's parallel sizes and, from engine_tp on, the servers'."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Chunks of layers on each pipeline stage; more than 1: an interleaved pipeline."""
    split: PipelineSplit = field(default_factory=PipelineSplit)
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1
    engine_tp: int = 1
    servers: int = 1
    quantized: bool = False
    """The servers hold the decoder's linear layers as fp8 blocks (weights.quantization)."""

    @classmethod
    def from_config(cls, config: Config) -> Layout:
        size = config.parallel_size
        return cls(
            tp=size("tensor_model"),
            pp=size("pipeline_model"),
            vpp=size("virtual_pipeline_model"),
            split=PipelineSplit.from_config(config),
            ep=size("expert_model"),
            etp=config.megatron.get("expert_tensor_parallel_size", size("tensor_model")),
            cp=size("context"),
            dp=config.trainer.data_parallel_size,
            engine_tp=config.engine_tp,
            servers=config.rollout.servers,
            quantized=config.sends_fp8,
        )

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers of each chunk in the order of the layers. Raises ConfigError."""
        return self.split.chunk_layers(self.pp, self.vpp, num_layers)

    def stage_layers(self, num_layers: int) -> list[int]:
        """Returns the number of layers of each pipeline stage. Raises ConfigError."""
        chunks = self.chunk_layers(num_layers)
        return [sum(chunks[stage :: self.pp]) for stage in range(self.pp)]

    def stage_of(self, layer: int, num_layers: int) -> int:
        """Returns the pipeline stage of a layer. Interleaved pipelines deal chunks in turn."""
        return _stages(self, num_layers)[layer]


@functools.lru_cache(maxsize=8)
def _stages(layout: Layout, num_layers: int) -> list[int]:
    """Returns the pipeline stage of each layer."""
    chunks = enumerate(layout.chunk_layers(num_layers))
    return [number % layout.pp for number, size in chunks for _ in range(size)]


def check(layout: Layout, shape: ModelShape) -> None:
    """Raises ConfigError if trainer or servers cannot run the model in this layout."""
    check_trainer(layout, shape)
    check_engine(layout, shape)


def check_trainer(layout: Layout, shape: ModelShape) -> None:
    """Raises ConfigError if Megatron cannot split the model so."""
    split_by_tp = {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
    }
    split_by_tp |= _mlp_sizes(shape) | _linear_sizes(shape)
    _check_divides("megatron.tensor_model_parallel_size", layout.tp, split_by_tp)
    if layout.vpp > 1 and layout.pp == 1:
        raise ConfigError(
            f"megatron.virtual_pipeline_model_parallel_size = {layout.vpp} needs "
            "pipeline_model_parallel_size >= 2",
            "raise that, or remove the key",
        )
    layout.chunk_layers(shape.num_layers)
    if shape.num_experts:
        experts = {"num_experts": shape.num_experts}
        _check_divides("megatron.expert_model_parallel_size", layout.ep, experts)
        ffn = {"moe_intermediate_size": shape.expert_ffn_hidden_size}
        _check_divides("megatron.expert_tensor_parallel_size", layout.etp, ffn)
    elif layout.ep > 1:
        raise ConfigError(
            f"megatron.expert_model_parallel_size = {layout.ep}, but the model has no experts",
            "set it to 1",
        )
    stage_ranks = layout.tp * layout.cp * layout.dp
    if stage_ranks % (layout.ep * layout.etp):
        raise ConfigError(
            f"megatron.expert_model_parallel_size = {layout.ep} times expert_tensor_parallel_size "
            f"= {layout.etp} does not divide the {stage_ranks} ranks of a pipeline stage",
            "raise trainer.data_parallel_size or lower one of them",
        )


def check_engine(layout: Layout, shape: ModelShape) -> None:
    """Raises ConfigError if SGLang cannot split the model so."""
    heads, kv_heads, tp = shape.num_attention_heads, shape.num_query_groups, layout.engine_tp
    counts = {"num_attention_heads": heads, "vocabulary padding": VOCABULARY_MULTIPLE}
    counts |= _mlp_sizes(shape) | _linear_sizes(shape)
    if shape.num_experts:
        counts["moe_intermediate_size"] = shape.expert_ffn_hidden_size
    fitting = [
        size for size in _divisors(*counts.values()) if kv_heads % size == 0 or size % kv_heads == 0
    ]
    _check_divides("sglang.tp_size", tp, counts, fitting)
    if tp not in fitting:
        raise ConfigError(
            f"sglang.tp_size = {tp} neither divides the model's num_key_value_heads = {kv_heads} "
            "nor is a multiple of it",
            f"set it to one of {_listed(fitting)}",
        )
    if layout.quantized:
        block_fp8.check_engine(shape, tp)


def _mlp_sizes(shape: ModelShape) -> dict[str, int]:
    """Returns the sizes that tensor parallelism splits in MLPs, apart from those of experts."""
    sizes = {}
    if not shape.num_experts or shape.num_dense_layers:
        sizes["intermediate_size"] = shape.ffn_hidden_size
    if shape.shared_ffn_hidden_size:
        name = "n_shared_experts * moe_intermediate_size"
        if shape.linear:
            name = "shared_expert_intermediate_size"
        sizes[name] = shape.shared_ffn_hidden_size
    return sizes


def _linear_sizes(shape: ModelShape) -> dict[str, int]:
    """Returns the sizes of linear attention that tensor parallelism splits."""
    return {"linear_num_key_heads": shape.linear.num_key_heads} if shape.linear else {}


def _check_divides(
    key: str, size: int, counts: dict[str, int], fitting: list[int] | None = None
) -> None:
    """Raises ConfigError if `size` does not divide one of the model's counts, given by name."""
    for name, count in counts.items():
        if count % size:
            raise ConfigError(
                f"{key} = {size} does not divide the model's {name} = {count}",
                f"set it to one of {_listed(fitting or _divisors(*counts.values()))}",
            )


def _divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
