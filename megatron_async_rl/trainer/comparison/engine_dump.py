"""Reads the outputs of SGLang's modules, as debug_tensor_dump_output_folder writes them.

A folder per rank, TP0_PP0_Rank0_pid1 and so on, has a file per forward pass. The file has the
outputs of all modules without children by name, and the input ids of the pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_async_rl.errors import EngineError
from megatron_async_rl.trainer.comparison.operations import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    layer_operation,
)

_IDS = "model.forward_batch_info.input_ids"


def read_passes(folder: Path, sequences: list[list[int]]) -> list[dict[str, Tensor]]:
    """Returns the operations of the prefill of each sequence, tensors [T, columns].

    Raises EngineError if the prefill of one is missing.
    """
    ranks = sorted(folder.glob("TP0_*"))
    parallel = any(folder.glob("TP1_*"))
    files = [file for rank in ranks for file in sorted(rank.glob("*.pt"))]
    prefills: dict[tuple[int, ...], dict[str, Any]] = {}
    wanted = set(map(tuple, sequences))
    for file in files:
        outputs = torch.load(file, map_location="cpu", weights_only=True)
        ids = tuple(outputs[_IDS].tolist()) if _IDS in outputs else ()
        if ids in wanted:
            prefills.setdefault(ids, {}).update(outputs)  # a file per pipeline stage
    missing = len(wanted - prefills.keys())
    if missing:
        raise EngineError(
            f"the server did not write the operations of {missing} of {len(wanted)} prefills into "
            f"{folder}",
            "its model must have its layers at model.layers, and must not cut prefills: remove "
            "sglang.chunked_prefill_size and sglang.enable_torch_compile",
        )
    return [_named(prefills[tuple(ids)], parallel) for ids in sequences]


def _named(outputs: dict[str, Any], parallel: bool) -> dict[str, Tensor]:
    named = {}

    def add(name: str, module: str, output: int = 0) -> None:
        found = outputs.get(module)
        tensors = found if isinstance(found, list) else [found]
        if found is not None and output < len(tensors):
            named[name] = tensors[output]

    add(EMBEDDING, "model.embed_tokens")
    layers = {key.split(".")[2] for key in outputs if key.startswith("model.layers.")}
    for layer in sorted(map(int, layers)):
        for operation in LAYER:
            if operation.replicated or not parallel:
                module = f"model.layers.{layer}.{operation.engine}"
                if module not in outputs:  # Qwen3-Next has no such level
                    module = module.replace(".self_attn.", ".")
                add(layer_operation(layer, operation.name), module, operation.output)
    add(FINAL_NORM, "model.norm")
    return named
