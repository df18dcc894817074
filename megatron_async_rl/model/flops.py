"""FLOPs that a training step needs by the model's sizes, and nominal rates of GPUs.

docs/metrics.md defines the utilization that follows from them. Recomputation, padding, the critic
and the forward passes before training do not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_async_rl.model import memory
from megatron_async_rl.model.shape import ModelShape

# Datasheets: dense bf16 TFLOP/s; the first name that the device's name contains. PCIe and NVL
# boards run at lower clocks.
NOMINAL_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
}


def nominal_tflops(device_name: str) -> float | None:
    """Returns the rate of a GPU by its name (torch.cuda.get_device_name); None if not known."""
    return next((rate for name, rate in NOMINAL_TFLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class ModelFlops:
    """The sizes that determine the FLOPs of a model.

    Forward, a token costs 2 FLOPs for each weight of a matrix product, and causal attention over a
    sequence of n tokens 2 n^2 for each layer, query head and channel: half of two products of
    n x n. Backward costs twice as much (Narayanan et al., arXiv 2104.04473, appendix, which counts
    attention without the causal half). The products with the state of a linear attention do not
    count.
    """

    weights: int  # attention, feed-forward or top_k experts and the router, output layer
    attention_width: int  # layers * query heads * head size

    @classmethod
    def of(cls, shape: ModelShape, router_top_k: int) -> ModelFlops:
        dense, expert = memory.layer_parameters(shape)
        layer = dense + router_top_k * expert
        weights = shape.num_layers * layer + memory.vocabulary_parameters(shape)
        return cls(weights, shape.num_layers * shape.attention_width)

    @property
    def attention_length(self) -> float:
        """The sequence length at which attention takes as many FLOPs as the products."""
        return self.weights / self.attention_width

    def training(self, lengths: Iterable[int]) -> float:
        """Returns the FLOPs of forward and backward over sequences of these lengths."""
        return 6.0 * sum(n * self.weights + n * n * self.attention_width for n in lengths)
