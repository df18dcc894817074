"""Grouped experts: the grouped product against a loop, names of experts in all three layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from config_builders import trainer_config
from model_shapes import tiny_shape

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.model.config_json import Architecture
from megatron_async_rl.model.families import FAMILIES
from megatron_async_rl.trainer.model import megatron_config
from megatron_async_rl.trainer.model.experts import TokenGroups, grouped_linear
from megatron_async_rl.trainer.model.fused import swiglu
from megatron_async_rl.weights.parameters import expert_names

COUNTS = [5, 0, 16, 3, 0]
QWEN3_MOE = next(family for family in FAMILIES if family.name == "qwen3_moe")


def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_loop_give_the_same_outputs_and_gradients(dtype: torch.dtype) -> None:
    """torch's grouped product also runs on a CPU; on a GPU of Hopper's kind it is the kernel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(COUNTS), 8, 16, generator=generator).to(dtype).requires_grad_()
    results = []
    for ends_E in (None, ends()):
        y = grouped_linear(x, weight, TokenGroups(COUNTS, ends_E))
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for loop, kernel in zip(*results, strict=True):
        assert torch.equal(loop, kernel) and loop.abs().max() > 0
    assert not results[1][2][1].any() and not results[1][2][4].any()  # experts without tokens


def test_grouped_product_is_that_of_each_expert() -> None:
    x = torch.randn(sum(COUNTS), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(COUNTS), 4, 6, dtype=torch.float64, requires_grad=True)
    groups = TokenGroups.of(torch.tensor(COUNTS), use_kernel=False)
    numbers = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    want = torch.einsum("toi,ti->to", weight[numbers], x)
    torch.testing.assert_close(grouped_linear(x, weight, groups), want)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, groups), (x, weight))


def test_no_tokens_give_no_outputs_and_gradients_of_zero() -> None:
    x, weight = torch.zeros(0, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    y = grouped_linear(x, weight, TokenGroups.of(torch.tensor([0, 0]), use_kernel=False))
    y.sum().backward()
    assert y.shape == (0, 4) and not weight.grad.any()


def test_weighted_swiglu_matches_the_formula() -> None:
    x = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, 1)
    torch.testing.assert_close(swiglu(x, weight), F.silu(gate) * up * weight[:, None])
    assert torch.autograd.gradcheck(swiglu, (x, weight))
    none = swiglu(x[:0], weight[:0])  # experts that got no tokens
    none.sum().backward()
    assert none.shape == (0, gate.size(1)) and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize(
    "local, names",
    [
        ("local_experts.1.linear_fc1.weight", [("local_experts.5.linear_fc1.weight", None)]),
        ("linear_fc2.weight1", [("local_experts.5.linear_fc2.weight", None)]),
        (
            "linear_fc1.weight",
            [(f"local_experts.{n}.linear_fc1.weight", n - 4) for n in (4, 5)],
        ),
    ],
    ids=["sequential", "Transformer Engine", "stacked"],
)
def test_experts_have_the_same_names_in_every_layout(
    local: str, names: list[tuple[str, int | None]]
) -> None:
    prefix = "decoder.layers.3.mlp.experts."
    want = [(prefix + name, row) for name, row in names]
    assert expert_names(prefix + local, experts=2, first=4) == want


@pytest.mark.parametrize(
    "name", ["mlp.router.weight", "mlp.shared_experts.linear_fc1.weight", "mlp.linear_fc2.weight"]
)
def test_names_of_other_parameters_are_kept(name: str) -> None:
    assert expert_names(name, experts=2, first=4) == [(name, None)]


def transformer_config(**megatron: object) -> megatron_config.TransformerConfig:
    architecture = Architecture(
        family=QWEN3_MOE,
        layernorm_epsilon=1e-6,
        rotary_base=1e6,
        rope_scaling_factor=None,
        max_positions=4096,
        router_top_k=2,
    )
    config = trainer_config(**megatron)
    megatron_config.check_keys(config.megatron)
    return megatron_config.transformer_config(config, tiny_shape(QWEN3_MOE), architecture)


def test_experts_are_grouped_unless_told_otherwise() -> None:
    made = transformer_config()
    assert made.moe_grouped_gemm and made.moe_token_dispatcher_type == "alltoall"
    assert made.moe_router_load_balancing_type == "none"
    assert not transformer_config(moe_grouped_gemm=False).moe_grouped_gemm


def test_router_settings_keep_their_megatron_names() -> None:
    chosen = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_z_loss_coeff": 1e-4,
        "moe_router_dtype": "fp64",
        "moe_token_dispatcher_type": "flex",
    }
    made = transformer_config(**chosen)
    assert {key: getattr(made, key) for key in chosen} == chosen


def test_experts_split_the_sequence_under_tensor_parallelism() -> None:
    assert transformer_config(tensor_model_parallel_size=2).sequence_parallel
    with pytest.raises(ConfigError, match=r"megatron\.sequence_parallel = false.*remove the key"):
        transformer_config(tensor_model_parallel_size=2, sequence_parallel=False)


def test_fused_permutation_without_transformer_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"megatron\.core refuses.*TransformerConfig"):
        transformer_config(moe_permute_fusion=True)
