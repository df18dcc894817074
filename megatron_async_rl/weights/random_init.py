"""Random weights for a model of which only config.json is given: benchmarks and checks of a layout."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megatron_async_rl.weights.load import Modules, global_parameters, tensor_parallel
from megatron_async_rl.weights.mapping import Index, ModelShape, from_hf, place

STD = 0.02


@torch.no_grad()
def fill_random(modules: Modules, shape: ModelShape, seed: int) -> None:
    """Fills this rank's part: normal with STD; what starts as ones (norms) stays. The same in every layout on one device.

    Each Hugging Face tensor is drawn whole from a generator of its own and then cut, as if it had been read from a file.
    """
    for name, parameter in global_parameters(modules):
        if name.endswith("norm.weight") or name.endswith("norm_weight"):
            continue
        sizes = dict(place(name, shape).pieces)

        def draw(
            hf: str,
            index: Index,
            sizes: dict[str, tuple[int, ...]] = sizes,
            like: Tensor = parameter,
        ) -> Tensor:
            generator = torch.Generator(like.device).manual_seed(
                zlib.crc32(f"{seed} {hf}".encode())
            )
            return (torch.randn(sizes[hf], generator=generator, device=like.device) * STD)[index]

        parameter.copy_(from_hf(name, draw, shape, *tensor_parallel(name)))
