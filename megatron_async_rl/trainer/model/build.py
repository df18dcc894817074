"""Builds a trainer rank's model, optimizer and learning rate schedule from megatron.core."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import Architecture, HfConfig
from megatron_async_rl.model.flops import ModelFlops
from megatron_async_rl.model.routing import replayed_routing
from megatron_async_rl.model.shape import ModelShape
from megatron_async_rl.trainer import parallel
from megatron_async_rl.trainer.algorithms.value_head import ValueHead
from megatron_async_rl.trainer.model import layers, megatron_config
from megatron_async_rl.trainer.model.routing import RoutingReplay
from megatron_async_rl.weights.load import fill_random, load_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerModel:
    """One rank's part of the policy or the critic."""

    config: TransformerConfig
    shape: ModelShape
    modules: list[GPTModel]
    """This pipeline stage's layers, one module or the chunks of an interleaved pipeline. Unwrapped:
    parameters have the names of model/families.py."""
    chunks: list[DistributedDataParallel]
    """The modules, wrapped for training."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    device: torch.device
    critic: TrainerModel | None = None
    """With algorithm.advantage.estimator = gae; has the same layout."""
    replay: RoutingReplay | None = None
    """With rollout.routing_replay."""

    @property
    def flops(self) -> ModelFlops:
        return ModelFlops.of(
            self.shape, self.config.moe_router_topk if self.shape.num_experts else 0
        )

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Returns the parameters of all modules, in order."""
        return itertools.chain.from_iterable(module.parameters() for module in self.modules)


def build(config: Config) -> TrainerModel:
    """Builds this rank's part of the policy, and of the critic if there is one.

    Call parallel.init_parallel first. Raises ConfigError, DataError.
    """
    critic = _build_critic(config) if config.algorithm.advantage.uses_critic else None
    model = _for_training(config, *build_modules(config), critic=critic)
    routing = replayed_routing(config)
    return replace(model, replay=RoutingReplay(model.modules, routing)) if routing else model


def _build_critic(config: Config) -> TrainerModel:
    transformer, shape, modules = build_modules(config, critic=True)
    if modules[-1].post_process:
        modules[-1].output_layer = ValueHead(transformer)
    # tied: the mapping of parameters to Hugging Face names must not expect an output layer.
    return _for_training(config, transformer, replace(shape, tied=True), modules, config.critic.lr)


def _for_training(
    config: Config,
    transformer: TransformerConfig,
    shape: ModelShape,
    modules: list[GPTModel],
    lr: float | None = None,
    critic: TrainerModel | None = None,
) -> TrainerModel:
    """Adds gradient buffers, optimizer and schedule to the modules."""
    ddp = megatron_config.ddp_config(config)
    half = transformer.bf16 or transformer.fp16
    chunks = [
        DistributedDataParallel(
            transformer,
            ddp,
            _in_half_precision(transformer, module) if half else module,
            # An interleaved pipeline reduces each later chunk's gradient as one bucket.
            disable_bucketing=number > 0,
        )
        for number, module in enumerate(modules)
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    optimizer_config = megatron_config.optimizer_config(config, lr)
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    if transformer.fp16:
        transformer.grad_scale_func = optimizer.scale_loss
    schedule = megatron_config.schedule_arguments(config, optimizer_config)
    scheduler = OptimizerParamScheduler(optimizer, **schedule)
    return TrainerModel(
        transformer, shape, modules, chunks, optimizer, scheduler, parallel.device(), critic
    )


def _in_half_precision(transformer: TransformerConfig, module: GPTModel) -> Float16Module:
    """Converts the parameters; buffers of routers stay in float32.

    Megatron uses their biases so, and counts of tokens would no longer grow in bf16.
    """
    routers = [part for part in module.modules() if isinstance(part, TopKRouter)]
    buffers = [(router, n, b.clone()) for router in routers for n, b in router.named_buffers()]
    wrapped = Float16Module(transformer, module)
    for router, name, buffer in buffers:
        getattr(router, name).data = buffer
    return wrapped


def build_modules(
    config: Config, critic: bool = False
) -> tuple[TransformerConfig, ModelShape, list[GPTModel]]:
    """Builds this rank's modules with their weights, without optimizer and gradient buffers.

    critic: from critic.path, with an untied output layer, which a value head then replaces.
    """
    megatron_config.check_keys(config.megatron)
    path = (config.critic.path if critic else None) or config.model.path
    hf_config = HfConfig(path)
    shape = hf_config.shape(megatron_config.padded_vocab_multiple(config))
    architecture = hf_config.architecture()
    if (
        config.parallel_size("context") > 1
        and torch.cuda.is_available()
        and not layers.has_transformer_engine()
    ):
        raise ConfigError(
            f"megatron.context_parallel_size = {config.parallel_size('context')} needs "
            "Transformer Engine on a GPU; install transformer-engine, or set it to 1 and split the "
            "model further with tensor_model_parallel_size"
        )
    megatron_config.check_layout(config, shape)
    if config.model.context_tokens > architecture.max_positions:
        logger.warning(
            "model.context_tokens = %d is more than the model's max_position_embeddings = %d",
            config.model.context_tokens,
            architecture.max_positions,
        )
    transformer = megatron_config.transformer_config(config, shape, architecture)
    vpp = config.parallel_size("virtual_pipeline_model")
    stages = range(vpp) if vpp > 1 else [None]
    built = replace(shape, tied=False) if critic else shape
    modules = [_build_module(transformer, built, architecture, stage) for stage in stages]
    if config.model.random_init:
        fill_random(modules, shape, config.run.seed)
    else:
        load_folder(modules, path, shape)
    return transformer, shape, modules


def _build_module(
    config: TransformerConfig, shape: ModelShape, architecture: Architecture, vp_stage: int | None
) -> GPTModel:
    chunks = config.virtual_pipeline_model_parallel_size or 1
    first, last = vp_stage in (None, 0), vp_stage in (None, chunks - 1)
    percent = architecture.rotary_percent
    rotary = {
        "rotary_base": architecture.rotary_base,
        "rope_scaling": architecture.rope_scaling_factor is not None,
        "rope_scaling_factor": architecture.rope_scaling_factor or 1.0,
    }
    module = GPTModel(
        config,
        layers.block_spec(config, vp_stage),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=architecture.max_positions,
        pre_process=first and mpu.is_pipeline_first_stage(ignore_virtual=True),
        post_process=last and mpu.is_pipeline_last_stage(ignore_virtual=True),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_percent=percent,
        vp_stage=vp_stage,
        **rotary,
    )
    if not (layers.has_transformer_engine() or config.multi_latent_attention):
        module.rotary_pos_emb = layers.PackedRotaryEmbedding(
            config.kv_channels, percent, rotary_interleaved=config.rotary_interleaved, **rotary
        )
    return module.to(parallel.device())
