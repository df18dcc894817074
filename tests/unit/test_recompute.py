"""Selective recomputation: equal gradients with fewer saved activations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_async_rl.trainer.model.fused import swiglu
from megatron_async_rl.trainer.model.recompute import SelectiveRecompute


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """Disables the garbage collector: memory that waits for it counts as kept."""
    gc.disable()
    yield
    gc.enable()


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [x.grad for x in inputs]


def test_named_activation_is_recomputed_once_per_view() -> None:
    x, w = torch.randn(6, 8, dtype=torch.double), torch.randn(4, 4, dtype=torch.double)
    made = []

    def layer(x: Tensor, w: Tensor, remade: bool = True) -> Tensor:
        mixed = swiglu(x)  # [6, 4]

        def again() -> Tensor:
            made.append(1)
            return swiglu(x)

        with SelectiveRecompute() as selective:
            y = mixed @ w + mixed[1:4].T.sum() * mixed[0, 0]
            if remade:
                selective.recompute(mixed, again)
        storage = weakref.ref(mixed.untyped_storage())
        del mixed
        assert (storage() is None) == remade
        return y

    sources = []

    def over_fresh_input(x: Tensor, w: Tensor) -> Tensor:
        fresh = x * 2  # kept until backward for recomputation
        sources.append(weakref.ref(fresh.untyped_storage()))
        y = layer(fresh, w)
        del fresh
        assert sources[0]() is not None
        return y

    gradients(over_fresh_input, x, w)
    assert sources[0]() is None
    made.clear()
    got, want = gradients(layer, x, w), gradients(lambda x, w: layer(x, w, False), x, w)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(made) == 2  # for the product with mixed, and for mixed[0, 0]


def test_outputs_saved_by_later_layers_are_stored_once() -> None:
    """As in attention over several sequences: backward of each needs its own output.

    The next layer saves them concatenated.
    """
    given = [torch.randn(n, 2, 4, dtype=torch.double) for n in (5, 3)]
    storages = []

    def attend(*parts: Tensor) -> Tensor:
        with SelectiveRecompute() as selective:
            out = [
                F.scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3, is_causal=True)[
                    0
                ].transpose(0, 1)
                for x in parts
            ]
            whole = torch.cat(out)
            for part, again in zip(out, whole.detach().split([5, 3]), strict=True):
                storages.append(weakref.ref(part.untyped_storage()))
                selective.recompute(part, again.detach)
        del out, part
        assert all(storage() is None for storage in storages)
        return whole.flatten(1).square()

    def plain(*parts: Tensor) -> Tensor:
        return (
            torch.cat(
                [
                    F.scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3, is_causal=True)[
                        0
                    ].transpose(0, 1)
                    for x in parts
                ]
            )
            .flatten(1)
            .square()
        )

    for a, b in zip(gradients(attend, *given), gradients(plain, *given), strict=True):
        assert torch.equal(a, b)


def test_recompute_with_another_layout_is_rejected() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with SelectiveRecompute() as selective:
        y = x.exp()
        z = y.square()
        selective.recompute(y, lambda: x.exp().T.contiguous().T)
    try:
        z.sum().backward()
    except AssertionError as e:
        assert "strides" in str(e)
    else:
        raise AssertionError("not refused")
