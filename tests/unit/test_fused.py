"""Fused operations against their formulas in float64: values and gradients, also on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_async_rl.trainer.model import fused, logprobs
from megatron_async_rl.trainer.model.attention import _varlen
from megatron_async_rl.trainer.model.layers import RMSNorm
from megatron_async_rl.trainer.model.sequences import pack_sequences

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate_formula(x: Tensor, angles_TF: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def logprobs_formula(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float
) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits[:, :vocab] / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def compare(
    function: Callable[..., tuple[Tensor, ...]],
    formula: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    tolerance: float,
) -> None:
    """Compares outputs, and gradients of a random functional of them, relative to the largest."""
    g = torch.Generator().manual_seed(1)
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    exact = formula(*exact_inputs)
    weights = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in exact]
    sum((y * w).sum() for y, w in zip(exact, weights, strict=True)).backward()
    inputs = [x.detach().requires_grad_() for x in inputs]
    got = function(*inputs)
    sum((y * w.to(y)).sum() for y, w in zip(got, weights, strict=True)).backward()
    for y, want in zip(got, exact, strict=True):
        assert (y.detach().double().cpu() - want).abs().max() <= tolerance * want.abs().max()
    for x, want in zip(inputs, exact_inputs, strict=True):
        assert (x.grad.double().cpu() - want.grad).abs().max() <= tolerance * want.grad.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7, 1, 64), (50, 1, 4, 32)])
def test_rms_norm_matches_the_formula(device: str, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g) * 3, torch.randn(shape[-1], generator=g)
    given = [x.to(device), weight.to(device)]
    compare(
        lambda *a: (fused.rms_norm(*a, 1e-6),),
        lambda *a: (rms_norm_formula(*a, 1e-6),),
        given,
        1e-5,
    )
    # the path of a GPU, on the CPU
    compare(
        lambda *a: (fused._RMSNorm.apply(*a, 1e-6),),
        lambda *a: (rms_norm_formula(*a, 1e-6),),
        given,
        1e-5,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7, 1, 64), (33, 1, 4, 32)])
def test_swiglu_matches_the_formula(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3

    def formula(x: Tensor) -> tuple[Tensor]:
        gate, up = x.chunk(2, -1)
        return (gate / (1 + (-gate).exp()) * up,)

    compare(lambda x: (fused.swiglu(x),), formula, [x.to(device)], 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_rotation_matches_the_formula(device: str, tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(tokens, 4, 16, generator=g), torch.randn(tokens, 2, 16, generator=g)
    angles = torch.rand(tokens, 8, generator=g) * 100
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    compare(
        lambda q, k: fused.rotate(q, k, cos, sin),
        lambda q, k: (rotate_formula(q, angles.double()), rotate_formula(k, angles.double())),
        [q.to(device), k.to(device)],
        1e-5,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "tokens, columns, vocab, temperature", [(1, 40, 37, 1.0), (33, 1000, 1000, 0.7)]
)
def test_logprobs_match_the_formula(
    device: str,
    overwrite: bool,
    tokens: int,
    columns: int,
    vocab: int,
    temperature: float,
    monkeypatch: object,
) -> None:
    # several chunks, the last one smaller
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 8 * columns)
    g = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(tokens, columns, generator=g) * 4,
        torch.randint(0, vocab, (tokens,), generator=g),
    )

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs.token_logprobs(
            x * 1.0,  # not a leaf, so it may be overwritten
            targets.to(device),
            vocab_size=vocab,
            temperature=temperature,
            overwrite_logits=overwrite,
        )

    compare(
        ours, lambda x: logprobs_formula(x, targets, vocab, temperature), [logits.to(device)], 1e-5
    )


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a float32 result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


def test_float32_temporaries_are_no_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds for forward and backward of logprobs.py: bfloat16 logits stay bfloat16."""
    tokens, vocab = 700, 500
    logits = torch.randn(tokens, vocab).bfloat16().requires_grad_()
    given = {"vocab_size": vocab, "temperature": 0.7, "overwrite_logits": True}
    peaks = []
    for chunk in (10 * vocab, tokens * vocab):
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
        with Largest() as largest:
            got, entropy = logprobs.token_logprobs(
                logits * 1, torch.zeros(tokens, dtype=torch.int64), **given
            )
            (got + entropy).sum().backward()
        peaks.append(largest.elements)
    assert peaks == [10 * vocab, tokens * vocab]


@pytest.mark.gpu
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lengths", [[5], [900, 1, 130, 300], [5000, 4096], [4608, 4100, 700, 3]])
def test_grouped_varlen_attention_equals_each_sequence_alone(
    device: str, lengths: list[int]
) -> None:
    """Queries and keys are normalized and rotated as in the model, and recomputed for backward."""
    g = torch.Generator().manual_seed(0)
    total = sum(lengths)
    given = [torch.randn(total, h, 128, generator=g).bfloat16().to(device) for h in (8, 2, 2)]
    weight, angles = torch.rand(128, generator=g) + 0.5, torch.rand(total, 64, generator=g) * 100
    packed = pack_sequences(lengths, torch.device(device), thd=False, dense=False)
    packed.rotary_cos_TF, packed.rotary_sin_TF = angles.cos().to(device), angles.sin().to(device)
    norm = RMSNorm(TransformerConfig(num_layers=1, hidden_size=128, num_attention_heads=1), 128).to(
        device
    )
    norm.weight.data.copy_(weight)
    borders = packed.cu_seqlens_q.tolist()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (
            _varlen(norm(q[:, None]), norm(k[:, None]), v[:, None], packed, packed.rotary, None),
        )

    def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k = (
            rotate_formula(rms_norm_formula(x, weight.double(), 1e-6), angles.double())
            for x in (q, k)
        )
        parts = []
        for a, b in pairwise(borders):
            out = F.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return (torch.cat(parts),)

    compare(ours, formula, given, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lengths", [[8192], [5000, 4096, 3000, 96]])
def test_attention_saves_only_its_output_for_backward(device: str, lengths: list[int]) -> None:
    """Between forward and backward: the inputs, the output, and 1 % for the sums of the softmax."""
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, 1, h, 128, device=device).bfloat16().requires_grad_() for h in (8, 2, 2)
    )
    packed = pack_sequences(lengths, torch.device(device), thd=False, dense=False)
    packed.rotary_cos_TF = packed.rotary_sin_TF = torch.ones(total, 64, device=device)
    norm = RMSNorm(TransformerConfig(num_layers=1, hidden_size=128, num_attention_heads=1), 128).to(
        device
    )

    def run() -> int:
        before = torch.cuda.memory_allocated()
        out = _varlen(norm(q), norm(k), v, packed, packed.rotary, None)
        kept = torch.cuda.memory_allocated() - before
        out.sum().backward()
        return kept

    run()  # the first call may allocate work space
    assert run() <= 1.06 * q.numel() * 2 + 4 * 2 * 10 * total
