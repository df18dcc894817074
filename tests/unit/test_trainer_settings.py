"""The `megatron:` section: keys and values are checked before the model is built."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from config_builders import trainer_config
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from model_shapes import tiny_shape

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import Architecture
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.trainer import parallel
from megatron_async_rl.trainer.model import megatron_config

QWEN3 = FAMILIES[2]
ARCHITECTURE = Architecture(
    family=QWEN3,
    layernorm_epsilon=1e-6,
    rotary_base=1e6,
    rope_scaling_factor=None,
    max_positions=4096,
)


def test_unknown_megatron_key_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"megatron\.clip_gard.*megatron\.clip_grad"):
        megatron_config.check_keys({"clip_gard": 1.0})


@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("num_layers", 3, "config.json"),
        ("moe_layer_freq", 2, "config.json"),
        ("moe_router_enable_expert_bias", False, "config.json"),
        ("multi_latent_attention", True, "config.json"),
        ("rotary_interleaved", True, "config.json"),
        ("bf16", True, "trainer.precision"),
        ("hidden_dropout", 0.1, "without dropout"),
    ],
)
def test_key_owned_by_another_setting_is_rejected(key: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"megatron\.{key}.*{remedy}"):
        megatron_config.check_keys({key: value})


def test_keys_reach_every_class_that_has_them() -> None:
    config = trainer_config(
        lr="1e-6", adam_beta2=0.95, overlap_grad_reduce=True, recompute_granularity="selective"
    )
    megatron_config.check_keys(config.megatron)
    optimizer = megatron_config.optimizer_config(config)
    assert (optimizer.lr, optimizer.adam_beta2) == (1e-6, 0.95)  # YAML reads 1e-6 as a string
    assert megatron_config.ddp_config(config).overlap_grad_reduce
    assert (
        megatron_config.transformer_config(
            config, tiny_shape(QWEN3), ARCHITECTURE
        ).recompute_granularity
        == "selective"
    )


def test_value_of_wrong_type_error_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"megatron\.clip_grad = 'much'"):
        megatron_config.optimizer_config(trainer_config(clip_grad="much"))


def test_megatron_validation_error_becomes_a_config_error() -> None:
    with pytest.raises(ConfigError, match="TransformerConfig"):
        megatron_config.transformer_config(
            trainer_config(recompute_granularity="full", distribute_saved_activations=True),
            tiny_shape(QWEN3),
            ARCHITECTURE,
        )


@pytest.mark.parametrize(
    "sizes, rule",
    [
        ({"tensor_model": 8}, "num_key_value_heads = 4; set it to one of"),
        ({"pipeline_model": 4}, "num_hidden_layers = 2; lower it"),
    ],
)
def test_size_that_does_not_fit_the_model_is_rejected(sizes: dict[str, int], rule: str) -> None:
    config = trainer_config(**{f"{name}_parallel_size": size for name, size in sizes.items()})
    with pytest.raises(ConfigError, match=rule):
        megatron_config.check_layout(config, tiny_shape(QWEN3))


def test_model_follows_config_json_without_dropout() -> None:
    made = megatron_config.transformer_config(
        trainer_config("bf16", sequence_parallel=True), tiny_shape(QWEN3), ARCHITECTURE
    )
    assert (made.num_layers, made.num_query_groups, made.kv_channels, made.qk_layernorm) == (
        2,
        4,
        6,
        True,
    )
    assert made.hidden_dropout == made.attention_dropout == 0
    assert made.params_dtype == torch.bfloat16 and made.calculate_per_token_loss
    assert not made.sequence_parallel  # nothing to split with one tensor-parallel rank


def test_schedule_counts_training_steps() -> None:
    config = trainer_config(
        lr=2e-5, lr_warmup_iters=3, lr_decay_style="cosine", weight_decay=0.05, steps=250
    )
    got = megatron_config.schedule_arguments(config, megatron_config.optimizer_config(config))
    assert (got["max_lr"], got["lr_warmup_steps"], got["lr_decay_steps"]) == (2e-5, 3, 250)
    assert got["start_wd"] == got["end_wd"] == 0.05
    with pytest.raises(ConfigError, match="lr_warmup_iters = 300"):
        bad = trainer_config(lr_warmup_iters=300, lr_decay_iters=250)
        megatron_config.schedule_arguments(bad, megatron_config.optimizer_config(bad))


def test_schedule_values_step_by_step() -> None:
    """Linear warmup over two steps, half a cosine down to min_lr, constant afterwards."""
    config = trainer_config(
        lr=1.0, min_lr=0.1, lr_warmup_iters=2, lr_decay_iters=6, lr_decay_style="cosine"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        **megatron_config.schedule_arguments(config, megatron_config.optimizer_config(config)),
    )
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(5)]
    assert rates == pytest.approx([0.0, 0.5, *cosine, 0.1])


def test_critic_has_its_own_learning_rate() -> None:
    config = trainer_config(lr=1e-6, adam_beta2=0.95)
    critic = megatron_config.optimizer_config(config, 1e-3)
    assert (critic.lr, critic.adam_beta2, megatron_config.optimizer_config(config).lr) == (
        1e-3,
        0.95,
        1e-6,
    )
    assert megatron_config.schedule_arguments(config, critic)["max_lr"] == 1e-3


def test_interleaved_pipeline_sends_one_way_at_a_time() -> None:
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    shape = dataclasses.replace(tiny_shape(QWEN3), num_layers=4)
    made = megatron_config.transformer_config(trainer_config(**sizes), shape, ARCHITECTURE)
    assert made.overlap_p2p_comm and not made.batch_p2p_comm and made.variable_seq_lengths
    plain = megatron_config.transformer_config(
        trainer_config(**(sizes | {"virtual_pipeline_model_parallel_size": 1})), shape, ARCHITECTURE
    )
    assert plain.virtual_pipeline_model_parallel_size is None and plain.batch_p2p_comm


def test_fp16_loss_scale_uses_megatron_settings() -> None:
    config = trainer_config("fp16", loss_scale_window=5, hysteresis=3, min_loss_scale=4.0)
    made, optimizer = (
        megatron_config.transformer_config(config, tiny_shape(QWEN3), ARCHITECTURE),
        megatron_config.optimizer_config(config),
    )
    assert (
        made.fp16 and made.params_dtype == torch.float16 and optimizer.fp16 and not optimizer.bf16
    )
    assert (optimizer.initial_loss_scale, optimizer.loss_scale_window) == (65536, 5)
    assert (optimizer.hysteresis, optimizer.min_loss_scale, optimizer.loss_scale) == (3, 4.0, None)


def test_fp16_with_experts_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"trainer\.precision = fp16 with a model of experts.*use bf16"
    ):
        megatron_config.check_layout(
            trainer_config("fp16"), dataclasses.replace(tiny_shape(QWEN3), num_experts=4)
        )


def test_experts_one_by_one_need_the_layout_of_the_dense_layers() -> None:
    shape = dataclasses.replace(tiny_shape(QWEN3), num_experts=4, expert_ffn_hidden_size=24)
    other = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    with pytest.raises(ConfigError, match=r"moe_grouped_gemm = False .* make the two sizes equal"):
        megatron_config.check_layout(trainer_config("fp32", moe_grouped_gemm=False, **other), shape)
    megatron_config.check_layout(trainer_config("fp32", **other), shape)


def test_number_of_ranks_must_equal_the_product_of_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"2 trainer ranks.*tensor_model_parallel_size = 4.*needs 4"
    ):
        parallel.init_parallel(trainer_config(tensor_model_parallel_size=4))
