"""Translates the configuration and config.json into megatron.core's config classes.

Keys under `megatron:` keep Megatron's names and go to every config class with a field of that name.
Names that no class has and keys that config.json or another setting decides are refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import msgspec
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_async_rl.config import passed_on
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout, pipeline_split
from megatron_async_rl.model.config_json import Architecture
from megatron_async_rl.model.shape import LatentShape, LinearShape, ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Arguments of OptimizerParamScheduler, named as on Megatron's command line."""

    lr_warmup_iters: int = 0
    lr_warmup_init: float = 0.0
    lr_decay_iters: int | None = None  # None: run.steps
    lr_decay_style: str = "constant"
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: str = "exponential"
    start_weight_decay: float | None = None  # None: weight_decay
    end_weight_decay: float | None = None
    weight_decay_incr_style: str = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig:
    """Names of Megatron's command line without a field in megatron.core's config classes."""

    make_vocab_size_divisible_by: int = 1


CLASSES = (
    TransformerConfig,
    OptimizerConfig,
    DistributedDataParallelConfig,
    ScheduleConfig,
    OwnConfig,
)


def check_keys(megatron: dict[str, Any]) -> None:
    """Raises ConfigError for keys under `megatron:` that are unknown or cannot be set."""
    known = {f.name for cls in CLASSES for f in dataclasses.fields(cls)}
    passed_on.check_names("megatron", megatron, known, "megatron.core")


def _chosen(cls: type, config: Config) -> dict[str, Any]:
    """Returns the keys under `megatron:` that are fields of `cls`, converted to their types."""
    hints = get_type_hints(cls)
    out = {}
    for key, value in config.megatron.items():
        if key not in hints:
            continue
        try:
            # Not strict: YAML reads 1e-6 (no dot) as a string.
            out[key] = msgspec.convert(value, hints[key], strict=False)
        except msgspec.ValidationError as e:
            raise ConfigError(
                f"megatron.{key} = {value!r}: {str(e)[0].lower()}{str(e)[1:]}"
            ) from None
        except TypeError:  # the field's type is a callable or a list of enums
            out[key] = value  # megatron.core checks it
    return out


def _make(cls: type, **fields: Any) -> Any:
    try:
        return cls(**fields)
    except (ValueError, AssertionError, NotImplementedError, ImportError) as e:
        raise ConfigError(
            f"megatron.core refuses the settings under megatron: ({cls.__name__}: {e})",
            "change the setting that it names",
        ) from e


def check_layout(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError if Megatron cannot train the model in this parallel layout."""
    if shape.num_experts and config.trainer.precision == "fp16":
        raise ConfigError(
            "trainer.precision = fp16 with a model of experts: megatron.core scales the losses of "
            "experts and of the other layers separately, so an overflow in one is not seen by the "
            "other",
            "use bf16",
        )
    chosen = layout.Layout.from_config(config)
    one_by_one = config.megatron.get("moe_grouped_gemm") is False
    if shape.num_experts and one_by_one and chosen.ep == 1 and chosen.etp != chosen.tp:
        raise ConfigError(
            f"megatron.moe_grouped_gemm = False with expert_tensor_parallel_size = {chosen.etp}, "
            f"tensor_model_parallel_size = {chosen.tp} and expert_model_parallel_size = 1: "
            "megatron.core reduces the gradients of such experts over the ranks of the dense "
            "layers, which hold other parts of them",
            "remove moe_grouped_gemm, or make the two sizes equal",
        )
    layout.check_trainer(chosen, shape)


def padded_vocab_multiple(config: Config) -> int:
    """Returns the number of which the embedding's rows are a multiple."""
    own = OwnConfig(**_chosen(OwnConfig, config))
    return own.make_vocab_size_divisible_by * config.parallel_size("tensor_model")


def _param_dtype(config: Config) -> torch.dtype:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[config.trainer.precision]


def _has_fused_permutation() -> bool:
    """Returns whether Transformer Engine's kernels sort tokens by expert."""
    return torch.cuda.is_available() and getattr(moe_utils, "fused_permute", None) is not None


def _keep(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def transformer_config(
    config: Config, shape: ModelShape, architecture: Architecture
) -> TransformerConfig:
    """Returns Megatron's config of the model; raises ConfigError for settings that it refuses."""
    dtype = _param_dtype(config)
    on_cpu = not torch.cuda.is_available()
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "qk_layernorm": architecture.family.qk_norm or shape.latent is not None,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.family.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # The weights come from model.path. perform_initialization=False would also leave shards
        # without their mark, and the gradient norm would count tensor-parallel rank 0 only.
        "init_method": _keep,
        "output_layer_init_method": _keep,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "bias_activation_fusion": not on_cpu,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,  # needs Apex or TE
        "tensor_model_parallel_size": 1,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": config.parallel_size("pipeline_model") > 1,
        # Interleaved with two stages, each is both neighbors of the other: batched sends and
        # receives would be paired wrongly.
        "overlap_p2p_comm": config.parallel_size("virtual_pipeline_model") > 1,
        "batch_p2p_comm": config.parallel_size("virtual_pipeline_model") == 1,
        # variable_seq_lengths refuses the default, also without experts.
        "moe_token_dispatcher_type": "alltoall",
    }
    sizes = layout.Layout.from_config(config)
    chunks = sizes.chunk_layers(shape.num_layers)
    if sizes.split.is_automatic and len(set(chunks)) > 1:
        fields["pipeline_model_parallel_layout"] = pipeline_split.megatron_layout(chunks)
    if shape.num_experts:
        fields |= {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
            "moe_router_topk": architecture.router_top_k,
            # Softmax over all experts, or over the chosen ones, which equals normalizing those.
            "moe_router_pre_softmax": not architecture.router_normalizes,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": True,
            "moe_permute_fusion": _has_fused_permutation(),
            "sequence_parallel": True,  # Megatron's experts need it under tensor parallelism
        }
    if shape.num_dense_layers:
        fields["moe_layer_freq"] = [
            int(layer >= shape.num_dense_layers) for layer in range(shape.num_layers)
        ]
    if shape.shared_ffn_hidden_size:
        fields["moe_shared_expert_intermediate_size"] = shape.shared_ffn_hidden_size
    if architecture.family.router_bias:
        fields |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # as the model was trained
            "moe_router_topk_scaling_factor": architecture.router_scale,
        }
    if architecture.router_groups:
        fields |= {
            "moe_router_num_groups": architecture.router_groups,
            "moe_router_group_topk": architecture.router_group_top_k,
        }
    if shape.latent:
        fields |= _latent_fields(shape.latent, architecture)
    if shape.linear:
        fields |= _linear_fields(shape.linear)
    chosen = _chosen(TransformerConfig, config)
    if config.parallel_size("tensor_model") == 1:
        chosen["sequence_parallel"] = False  # Megatron refuses True at size 1
    elif shape.num_experts and chosen.get("sequence_parallel") is False:
        raise ConfigError(
            "megatron.sequence_parallel = false with tensor_model_parallel_size = "
            f"{config.parallel_size('tensor_model')} and a model of experts: megatron.core does "
            "not train that; remove the key"
        )
    if config.parallel_size("virtual_pipeline_model") == 1:
        # Megatron takes 1 for an interleaved pipeline.
        chosen.pop("virtual_pipeline_model_parallel_size", None)
    cls = MLATransformerConfig if shape.latent else TransformerConfig
    return _make(cls, **(fields | chosen))


def _latent_fields(latent: LatentShape, architecture: Architecture) -> dict[str, Any]:
    """Returns the fields of Megatron's config for latent attention."""
    yarn = dict(architecture.yarn or {})
    if yarn:
        yarn["rotary_scaling_factor"] = yarn.pop("factor")
    return yarn | {
        "q_lora_rank": latent.q_lora_rank or None,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": architecture.rotary_base,
    }


def _linear_fields(linear: LinearShape) -> dict[str, Any]:
    """Returns the fields of Megatron's config for a model with linear attention."""
    return {
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "moe_shared_expert_gate": True,
        "linear_attention_freq": linear.full_attention_interval,
        "linear_conv_kernel_dim": linear.conv_width,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
    }


def optimizer_config(config: Config, lr: float | None = None) -> OptimizerConfig:
    """Returns Megatron's optimizer config; `lr` overrides megatron.lr. Raises ConfigError."""
    dtype = _param_dtype(config)
    fields = {
        "optimizer": "adam",
        "lr": 1e-6,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        "clip_grad": 1.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Megatron's 2^32 needs about 17 skipped steps to come down to the range of fp16: cheap in a
        # long pretraining, expensive in reinforcement learning.
        "initial_loss_scale": 2.0**16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
    }
    chosen = _chosen(OptimizerConfig, config)
    return _make(OptimizerConfig, **(fields | chosen | ({} if lr is None else {"lr": lr})))


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Returns Megatron's config of gradient buffers; raises ConfigError."""
    cls = DistributedDataParallelConfig
    fields = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
    return _make(cls, **(fields | _chosen(cls, config)))


def schedule_arguments(config: Config, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Returns the arguments of OptimizerParamScheduler, in training steps; raises ConfigError."""
    s = ScheduleConfig(**_chosen(ScheduleConfig, config))
    decay = s.lr_decay_iters or max(config.run.steps, s.lr_warmup_iters + 1)
    if s.lr_warmup_iters >= decay:
        raise ConfigError(
            f"megatron.lr_warmup_iters = {s.lr_warmup_iters} must be less than lr_decay_iters = "
            f"{decay}; lower the first"
        )

    def or_weight_decay(value: float | None) -> float:
        return optimizer.weight_decay if value is None else value

    return {
        "init_lr": s.lr_warmup_init,
        "max_lr": optimizer.lr,
        "min_lr": optimizer.min_lr or 0.0,
        "lr_warmup_steps": s.lr_warmup_iters,
        "lr_decay_steps": decay,
        "lr_decay_style": s.lr_decay_style,
        "start_wd": or_weight_decay(s.start_weight_decay),
        "end_wd": or_weight_decay(s.end_weight_decay),
        "wd_incr_steps": decay,
        "wd_incr_style": s.weight_decay_incr_style,
        "wsd_decay_steps": s.lr_wsd_decay_iters,
        "lr_wsd_decay_style": s.lr_wsd_decay_style,
    }
