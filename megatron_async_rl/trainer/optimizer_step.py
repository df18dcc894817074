"""One optimizer step, refused before it would write what is not finite.

Two things look alike in a gradient, inf and nan, and are told apart. A loss that is not finite is refused: no scale helps.
With fp16 a finite loss may still overflow on its way back, because Megatron multiplies it by the loss scale: that
minibatch is skipped and counted, and the scale comes down (after megatron.hysteresis of them; up again after
megatron.loss_scale_window steps without). A scale at megatron.min_loss_scale that overflows is refused too.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_async_rl.errors import StepRefused
from megatron_async_rl.trainer.model.build import TrainerModel


def checked_norm(
    model: TrainerModel, loss: float, totals: dict[str, float], version: int, remedy: str
) -> float:
    """The gradient's norm; with fp16 it is not asked for yet, and 0.

    Raises StepRefused where loss or norm is not finite: on all ranks alike, as both are global.
    """
    norm = 0.0 if math.isfinite(loss) else math.nan
    if math.isfinite(loss) and not model.config.fp16:
        model.optimizer.prepare_grads()
        norm = float(model.optimizer.get_grad_norm())
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise StepRefused(
            f"training step {version}: loss {loss / max(totals['tokens'], 1):.6g}, gradient norm {norm:.6g}; weights are as "
            f"before; {remedy}"
        )
    return norm


def step(model: TrainerModel, norm: float, version: int) -> tuple[float, bool]:
    """(the gradient's norm before clipping, whether fp16 overflowed and nothing was written); collective.

    norm: `checked_norm`'s.
    """
    scale = model.optimizer.get_loss_scale().item() if model.config.fp16 else 1.0
    updated, scaled_norm, _ = model.optimizer.step()
    if updated:
        return float(scaled_norm or 0.0) if model.config.fp16 else norm, False
    if not model.config.fp16:
        raise StepRefused(
            f"training step {version}: the optimizer found non-finite gradients; weights are as before"
        )
    if scale <= _smallest_scale(model.optimizer):
        raise StepRefused(
            f"training step {version}: fp16 gradients overflow even at the smallest loss scale {scale:g}; weights are as "
            "before; lower megatron.lr or megatron.min_loss_scale, or set trainer.precision=bf16"
        )
    return 0.0, True


def _smallest_scale(optimizer: Any) -> float:
    """What the scale cannot go below: itself, where megatron.loss_scale fixes it."""
    config = optimizer.config
    return float(config.loss_scale or config.min_loss_scale)
