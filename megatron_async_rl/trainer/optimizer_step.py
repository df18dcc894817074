"""One optimizer step, refused before it would write non-finite weights.

A non-finite loss is refused: no loss scale helps. With fp16 a finite loss may still overflow in
backward, because Megatron multiplies it by the loss scale. Such a minibatch is skipped and counted,
and the scale decreases (after megatron.hysteresis overflows; it increases after
megatron.loss_scale_window steps without one). An overflow at megatron.min_loss_scale is refused.
"""

from __future__ import annotations

import math

from megatron.core.optimizer import MegatronOptimizer

from megatron_async_rl.errors import NonFiniteStep
from megatron_async_rl.trainer.model.build import TrainerModel


def checked_norm(
    model: TrainerModel, loss: float, totals: dict[str, float], version: int, remedy: str
) -> float:
    """Returns the norm of the accumulated gradient; 0 with fp16, where `step` computes it.

    Raises NonFiniteStep if loss or norm is not finite, on all ranks alike because both are global.
    """
    norm = 0.0 if math.isfinite(loss) else math.nan
    if math.isfinite(loss) and not model.config.fp16:
        model.optimizer.prepare_grads()
        norm = float(model.optimizer.get_grad_norm())
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise NonFiniteStep(
            f"training step {version}: loss {loss / max(totals['tokens'], 1):.6g}, gradient norm "
            f"{norm:.6g}; the weights are unchanged; {remedy}"
        )
    return norm


def step(model: TrainerModel, norm: float, version: int) -> tuple[float, bool]:
    """Makes the optimizer step; `norm` is the result of `checked_norm`. Collective.

    Returns the gradient's norm before clipping, and whether fp16 overflowed and nothing was
    written. Raises NonFiniteStep.
    """
    scale = model.optimizer.get_loss_scale().item() if model.config.fp16 else 1.0
    updated, scaled_norm, _ = model.optimizer.step()
    if updated:
        return float(scaled_norm or 0.0) if model.config.fp16 else norm, False
    if not model.config.fp16:
        raise NonFiniteStep(
            f"training step {version}: the optimizer found non-finite gradients; the weights are "
            "unchanged; lower megatron.lr"
        )
    if scale <= _smallest_scale(model.optimizer):
        raise NonFiniteStep(
            f"training step {version}: fp16 gradients overflow even at the smallest loss scale "
            f"{scale:g}; the weights are unchanged; lower megatron.lr or megatron.min_loss_scale, "
            "or set trainer.precision=bf16"
        )
    return 0.0, True


def _smallest_scale(optimizer: MegatronOptimizer) -> float:
    """Returns the lower bound of the loss scale: megatron.loss_scale if that fixes it."""
    config = optimizer.config
    return float(config.loss_scale or config.min_loss_scale)
