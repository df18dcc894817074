"""Our configuration and a model folder, in the words of megatron.core's config classes.

Keys under `megatron:` keep Megatron's names and go to every config class that has a field of that name. Refused are
names that no class has, what config.json decides, and what a setting of ours decides already.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_type_hints

import msgspec
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model import layout
from megatron_async_rl.model.config_json import Architecture
from megatron_async_rl.model.families import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """OptimizerParamScheduler's knobs, by the names Megatron's command line gives them. One iteration: a training step."""

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
    """Names of Megatron's command line that are arguments, not fields, in megatron.core."""

    make_vocab_size_divisible_by: int = 1


_CLASSES = (
    TransformerConfig,
    OptimizerConfig,
    DistributedDataParallelConfig,
    ScheduleConfig,
    OwnConfig,
)

_DECIDED = dict.fromkeys(
    (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts "
        "moe_ffn_hidden_size moe_router_topk normalization layernorm_epsilon qk_layernorm gated_linear_unit "
        "activation_func add_bias_linear add_qkv_bias"
    ).split(),
    "config.json in model.path decides it; remove the key",
) | {
    "init_method": "the weights come from model.path; remove the key",
    "output_layer_init_method": "the weights come from model.path; remove the key",
    "perform_initialization": "the weights come from model.path; remove the key",
    "bf16": "set trainer.precision instead",
    "fp16": "set trainer.precision instead",
    "params_dtype": "set trainer.precision instead",
    "pipeline_dtype": "set trainer.precision instead",
    "hidden_dropout": "a policy is trained without dropout; remove the key",
    "attention_dropout": "a policy is trained without dropout; remove the key",
    "calculate_per_token_loss": "the loss is always normalised by the global token count; remove the key",
    "variable_seq_lengths": "packed micro-batches always vary in length; remove the key",
    "moe_grouped_gemm": "each expert's weights are parameters of their own here; remove the key",
    "overlap_param_gather": "parameters are read between steps, which it does not wait for; remove the key",
    "use_megatron_fsdp": "FSDP is not supported; use tensor, pipeline and data parallelism",
    "optimizer": "adam is the only optimizer supported; remove the key",
}


def check_keys(megatron: dict[str, Any]) -> None:
    """Refuses keys under `megatron:` that nothing reads."""
    known = {f.name for cls in _CLASSES for f in dataclasses.fields(cls)} - _DECIDED.keys()
    for key, value in megatron.items():
        if key in _DECIDED:
            if key.endswith("_parallel_size") and value == 1:
                continue
            raise ConfigError(f"megatron.{key} = {value!r} cannot be set: {_DECIDED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"megatron.{key} is not a setting of megatron.core; did you mean megatron.{near[0]}? Known are the fields "
                f"of {', '.join(cls.__name__ for cls in _CLASSES[:3])} and lr_*"
            )


def _chosen(cls: type, config: Config) -> dict[str, Any]:
    """The keys under `megatron:` that are fields of `cls`, converted to the fields' types."""
    hints = get_type_hints(cls)
    out = {}
    for key, value in config.megatron.items():
        if key not in hints or key in _DECIDED:
            continue
        try:
            # Not strict: YAML reads 1e-6 (no dot) as a string.
            out[key] = msgspec.convert(value, hints[key], strict=False)
        except msgspec.ValidationError as e:
            raise ConfigError(
                f"megatron.{key} = {value!r}: {str(e)[0].lower()}{str(e)[1:]}"
            ) from None
        except (
            TypeError
        ):  # a field whose type is a callable or a list of enums: megatron.core checks it itself
            out[key] = value
    return out


def _make(cls: type, **fields: Any) -> Any:
    try:
        return cls(**fields)
    except (ValueError, AssertionError, NotImplementedError) as e:
        raise ConfigError(
            f"megatron.core refuses the settings under megatron: ({cls.__name__}: {e})"
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
    layout.check_trainer(layout.Layout.from_config(config), shape)


def padded_vocab_multiple(config: Config) -> int:
    """What the rows of the embedding are a multiple of."""
    own = OwnConfig(**_chosen(OwnConfig, config))
    return own.make_vocab_size_divisible_by * config.parallel_size("tensor_model")


def param_dtype(config: Config) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        config.trainer.precision
    ]


def _leave_as_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def transformer_config(
    config: Config, shape: ModelShape, architecture: Architecture
) -> TransformerConfig:
    dtype = param_dtype(config)
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
        "qk_layernorm": architecture.family.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.family.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # The weights come from model.path. Not perform_initialization=False: it also leaves the shards unmarked as
        # such, and the gradient's norm then misses those of all tensor-parallel ranks but the first.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
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
        # Interleaved, two stages are each other's both neighbours: sends and receives of one batch would meet wrongly.
        "overlap_p2p_comm": config.parallel_size("virtual_pipeline_model") > 1,
        "batch_p2p_comm": config.parallel_size("virtual_pipeline_model") == 1,
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths refuses the default, MoE or not
    }
    if shape.num_experts:
        fields |= {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
            "moe_router_topk": architecture.router_top_k,
            # softmax over all experts first, or over the chosen ones, which is the same as normalising what was chosen
            "moe_router_pre_softmax": not architecture.router_normalizes,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_aux_loss_coeff": 0.0,
        }
    chosen = _chosen(TransformerConfig, config)
    if config.parallel_size("tensor_model") == 1:
        chosen["sequence_parallel"] = (
            False  # Megatron refuses it; here a layout can be changed by one key
        )
    if config.parallel_size("virtual_pipeline_model") == 1:
        chosen.pop(
            "virtual_pipeline_model_parallel_size", None
        )  # to Megatron 1 is an interleaved pipeline
    return _make(TransformerConfig, **(fields | chosen))


def optimizer_config(config: Config, lr: float | None = None) -> OptimizerConfig:
    """lr: instead of megatron.lr."""
    dtype = param_dtype(config)
    fields = {
        "optimizer": "adam",
        "lr": 1e-6,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        "clip_grad": 1.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Megatron's 2^32 needs some 17 steps without an update to come down to where fp16 holds: those of a long
        # pretraining, but not of reinforcement learning, are cheap.
        "initial_loss_scale": 2.0**16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
    }
    chosen = _chosen(OptimizerConfig, config)
    return _make(OptimizerConfig, **(fields | chosen | ({} if lr is None else {"lr": lr})))


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    fields = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
    return _make(
        DistributedDataParallelConfig, **(fields | _chosen(DistributedDataParallelConfig, config))
    )


def schedule_arguments(config: Config, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Arguments of OptimizerParamScheduler, in training steps."""
    s = ScheduleConfig(**_chosen(ScheduleConfig, config))
    decay = s.lr_decay_iters or max(config.run.steps, s.lr_warmup_iters + 1)
    if s.lr_warmup_iters >= decay:
        raise ConfigError(
            f"megatron.lr_warmup_iters = {s.lr_warmup_iters} must be less than lr_decay_iters = {decay}; lower the first"
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
