"""The rules of keys under `megatron:` and `sglang:`, which reach the installed versions unchanged.

Reserved keys, which this package sets itself, are refused when a configuration is loaded. All
others must be settings of the installed version (installed.py), spelled exactly: SGLang would take
`mem_fraction` for an abbreviation. The values must be of a type that the version declares.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any, Union

import msgspec

from megatron_async_rl.errors import ConfigError

_TYPES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "null": None,
}

_MODEL = "config.json in model.path decides it; remove the key"
_WEIGHTS = "the weights come from model.path; remove the key"
_DROPOUT = "a policy is trained without dropout; remove the key"
_PRECISION = "set trainer.precision instead"
_ONE_SERVER = "a server runs on the GPUs of one host; set rollout.servers instead"
_EXPERTS = "digests of weight updates are those of tensor-parallel experts; set sglang.tp_size"
_KEYS = "each server gets keys of its own; remove the key"

# Keys that cannot be set: the reason and the remedy.
MEGATRON_RESERVED = dict.fromkeys(
    (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "num_moe_experts moe_ffn_hidden_size moe_router_topk normalization layernorm_epsilon "
        "qk_layernorm gated_linear_unit activation_func add_bias_linear add_qkv_bias "
        "moe_layer_freq moe_shared_expert_intermediate_size moe_shared_expert_gate "
        "moe_router_pre_softmax moe_router_score_function moe_router_enable_expert_bias "
        "attention_output_gate layernorm_zero_centered_gamma experimental_attention_variant "
        "linear_attention_freq linear_conv_kernel_dim linear_num_key_heads linear_num_value_heads "
        "linear_key_head_dim linear_value_head_dim "
        "moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk "
        "multi_latent_attention rotary_interleaved no_rope_freq softmax_scale softmax_type "
        "window_size activation_func_clamp_value glu_linear_offset mtp_num_layers moe_latent_size"
    ).split(),
    _MODEL,
) | {
    "init_method": _WEIGHTS,
    "output_layer_init_method": _WEIGHTS,
    "perform_initialization": _WEIGHTS,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "params_dtype": _PRECISION,
    "pipeline_dtype": _PRECISION,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "calculate_per_token_loss": "the loss is always divided by the token count; remove the key",
    "variable_seq_lengths": "packed micro-batches always vary in length; remove the key",
    "overlap_param_gather": "it does not wait for reads between steps; remove the key",
    "use_megatron_fsdp": "FSDP is not supported; use tensor, pipeline and data parallelism",
    "optimizer": "adam is the only optimizer supported; remove the key",
}
SGLANG_RESERVED = {
    "model": "set model.path instead",
    "model_path": "set model.path instead",
    "tokenizer_path": "set model.path instead",
    "context_length": "set model.context_tokens instead",
    "skip_tokenizer_init": "rollout.stop and agents decide it; remove the key",
    "weight_version": "weights are labelled with the version of the run; remove the key",
    "enable_return_routed_experts": "set rollout.routing_replay instead",
    "config": "write the settings of SGLang under sglang: instead",
    "api_key": _KEYS,
    "admin_api_key": _KEYS,
    "dp_size": _ONE_SERVER,
    "pp_size": "weight updates reach tensor-parallel ranks only; set sglang.tp_size instead",
    "ep_size": _EXPERTS,
    "moe_dp_size": _EXPERTS,
    "nnodes": _ONE_SERVER,
    "node_rank": _ONE_SERVER,
    "dist_init_addr": _ONE_SERVER,
    "base_gpu_id": "the launcher assigns the GPUs; set CUDA_VISIBLE_DEVICES of `run` instead",
    "gpu_id_step": "the launcher assigns the GPUs; set CUDA_VISIBLE_DEVICES of `run` instead",
    "disaggregation_mode": "a server does both prefill and decoding; remove the key",
    "is_embedding": "the servers generate; remove the key",
}
_RESERVED = {"megatron": MEGATRON_RESERVED, "sglang": SGLANG_RESERVED}

# Names under which other projects have a setting, and the setting here.
_ELSEWHERE = {
    "megatron": {
        "learning_rate": "megatron.lr",
        "warmup_steps": "megatron.lr_warmup_iters",
        "lr_warmup_steps": "megatron.lr_warmup_iters",
        "lr_scheduler_type": "megatron.lr_decay_style",
        "max_grad_norm": "megatron.clip_grad",
        "grad_clip": "megatron.clip_grad",
        "beta1": "megatron.adam_beta1",
        "beta2": "megatron.adam_beta2",
        "epsilon": "megatron.adam_eps",
        "wd": "megatron.weight_decay",
        "tensor_parallel_size": "megatron.tensor_model_parallel_size",
        "tp_size": "megatron.tensor_model_parallel_size",
        "tp": "megatron.tensor_model_parallel_size",
        "pipeline_parallel_size": "megatron.pipeline_model_parallel_size",
        "pp_size": "megatron.pipeline_model_parallel_size",
        "pp": "megatron.pipeline_model_parallel_size",
        "expert_parallel_size": "megatron.expert_model_parallel_size",
        "ep_size": "megatron.expert_model_parallel_size",
        "cp_size": "megatron.context_parallel_size",
        "data_parallel_size": "trainer.data_parallel_size",
        "dp_size": "trainer.data_parallel_size",
        "global_batch_size": "algorithm.prompts_per_step",
        "micro_batch_size": "trainer.max_tokens_per_microbatch",
        "seq_length": "model.context_tokens",
        "max_position_embeddings": "model.context_tokens",
        "train_iters": "run.steps",
        "save_interval": "checkpoint.every",
        "seed": "run.seed",
        "max_steps": "run.steps",
        "batch_size": "algorithm.prompts_per_step",
        "train_batch_size": "algorithm.prompts_per_step",
        "group_size": "algorithm.samples_per_prompt",
        "num_generations": "algorithm.samples_per_prompt",
        "kl_coef": "algorithm.kl.coef",
        "max_completion_length": "rollout.max_new_tokens",
        "max_response_length": "rollout.max_new_tokens",
    },
    "sglang": {
        "gpu_memory_utilization": "sglang.mem_fraction_static",
        "tensor_parallel_size": "sglang.tp_size",
        "tp": "sglang.tp_size",
        "data_parallel_size": "rollout.servers",
        "max_model_len": "model.context_tokens",
        "max_num_seqs": "rollout.max_concurrent_samples",
        "temperature": "rollout.temperature",
        "max_new_tokens": "rollout.max_new_tokens",
    },
}

# Values that a library refuses only when training begins: [low, high), or the choices.
_LIMITS = {
    "megatron.lr": (0.0, math.inf),
    "megatron.min_lr": (0.0, math.inf),
    "megatron.clip_grad": (0.0, math.inf),
    "megatron.weight_decay": (0.0, math.inf),
    "megatron.adam_beta1": (0.0, 1.0),
    "megatron.adam_beta2": (0.0, 1.0),
    "megatron.adam_eps": (0.0, math.inf),
    "sglang.mem_fraction_static": (0.01, 1.0),
    "sglang.random_seed": (0, 1 << 32),
}
_CHOICES = {
    "megatron.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "sglang.device": ("cuda", "cpu"),
}


class KnownSetting(msgspec.Struct, frozen=True):
    types: list[str] = []  # keys of _TYPES; empty if the version does not declare them
    choices: list[str | int | float | bool | None] = []  # empty: all values of the types
    alias_of: str = ""


class KnownSettings(msgspec.Struct, frozen=True):
    """The settings of an installed version."""

    library: str  # name and version
    settings: dict[str, KnownSetting]


def check_reserved(section: str, values: dict[str, Any]) -> None:
    """Raises ConfigError for a key that this package sets itself; a size of 1 changes nothing."""
    for key, value in values.items():
        reason = _RESERVED[section].get(key)
        if reason and not (value == 1 and (key.endswith("_size") or key == "nnodes")):
            raise ConfigError(f"{section}.{key} = {value!r} cannot be set: {reason}")


def check_names(section: str, values: dict[str, Any], known: Collection[str], library: str) -> None:
    """Raises ConfigError for a reserved key, and for one that is not among `known`."""
    check_reserved(section, values)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{section}.{key} = {value!r} is not a setting of {library}; did you mean "
                f"{_nearest(section, key, known)}?"
            )


def check(section: str, values: dict[str, Any], known: KnownSettings) -> None:
    """Raises ConfigError for a key that the installed version does not have or has under another
    name, and for a value of another type."""
    check_names(section, values, known.settings, known.library)
    for key, value in values.items():
        setting, name = known.settings[key], f"{section}.{key}"
        if setting.alias_of:
            raise ConfigError(
                f"{section}.{key} = {value!r} is another name of {section}.{setting.alias_of}",
                f"set {section}.{setting.alias_of} instead",
            )
        if value is None and (section == "sglang" or "null" in setting.types):
            continue  # the library's default
        if setting.types and not _fits(value, setting.types, strict=section == "sglang"):
            types = " or ".join(name for name in setting.types if name != "null")
            raise ConfigError(
                f"{section}.{key} = {value!r}: {known.library} expects {types}",
                "write a value of that type",
            )
        low, high = _LIMITS.get(name, (-math.inf, math.inf))
        if name in _LIMITS and not low <= float(value) < high:
            below = "" if high == math.inf else f" and less than {high:g}"
            raise ConfigError(f"{name} = {value!r}: expected at least {low:g}{below}")
        allowed = _CHOICES.get(name, setting.choices)
        if allowed and value not in allowed and not isinstance(value, list):
            choices = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise ConfigError(
                f"{section}.{key} = {value!r} is not a choice of {known.library}",
                f"use one of {choices}",
            )


def _fits(value: Any, types: list[str], strict: bool) -> bool:
    """Not strict: a number or bool may also be a text, as the trainer converts it."""
    try:
        msgspec.convert(value, Union[tuple(_TYPES[name] for name in types)], strict=strict)
    except msgspec.ValidationError:
        return False
    return True


def elsewhere(section: str, name: str) -> str:
    """Returns the setting that other projects call `name`, or that has this name, "" if none."""
    names = _ELSEWHERE[section]
    same = (setting for setting in names.values() if setting == f"{section}.{name}")
    return names.get(name) or next(same, "")


def _nearest(section: str, key: str, known: Collection[str]) -> str:
    if found := elsewhere(section, key):
        return found
    key = key.lower().replace("-", "_")
    longer = sorted(name for name in known if name.startswith(key))
    near = longer or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{section}.{near[0]}"
