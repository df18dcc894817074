"""`torchrun -m megatron_async_rl.trainer.comparison.ranks CONFIG FOLDER`: runs and compares.

FOLDER has the sequences and the engine's operations. Every data-parallel replica runs the same
sequences; the first replica's stages write their operations, and rank 0 compares.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import SelftestFailed
from megatron_async_rl.protocol.types import TrainSample
from megatron_async_rl.trainer.comparison import sequences as files
from megatron_async_rl.trainer.comparison.difference import Comparison
from megatron_async_rl.trainer.comparison.engine_dump import read_passes
from megatron_async_rl.trainer.comparison.operations import LOOK_AT
from megatron_async_rl.trainer.comparison.sequences import ComparedSequence


def _main(config_path: Path, folder: Path) -> None:
    config = configuration.load(config_path)
    patches.prepare_megatron()
    import torch.distributed as dist

    from megatron_async_rl.trainer import parallel
    from megatron_async_rl.trainer.model import build

    parallel.init_parallel(config)
    model = build.build(config)
    sequences = files.read(folder / files.NAME)
    for number, sequence in enumerate(sequences):
        _run_sequence(model, config, sequence, folder, number)
    dist.barrier()
    if dist.get_rank() == 0:
        _report(model, folder, sequences)


def _run_sequence(
    model: Any, config: Config, sequence: ComparedSequence, folder: Path, number: int
) -> None:
    """Writes the operations of this stage and, on the last one, the logprobs; collective."""
    from megatron.core import parallel_state as mpu
    from safetensors.torch import save_file

    from megatron_async_rl.trainer import passes
    from megatron_async_rl.trainer.comparison.recorder import Recorder
    from megatron_async_rl.trainer.data.microbatch import Packing, pack

    keeps = not (mpu.get_data_parallel_rank() or mpu.get_tensor_model_parallel_rank())
    recorder = Recorder(model, keeps)
    packing = Packing.of(model, config)
    microbatch = pack([_sample(sequence)], 0, packing)
    found = passes.current_logprobs(model, [[microbatch] * packing.count_multiple], config)
    recorder.remove()
    if not keeps:
        return
    outputs = {name: tensor.contiguous() for name, tensor in recorder.outputs.items()}
    if found:
        outputs["logprobs"] = found[0][: len(sequence.ids) - 1].float().cpu()
    save_file(outputs, _path(folder, number, mpu.get_pipeline_model_parallel_rank()))


def _path(folder: Path, number: int, stage: int) -> Path:
    return folder / f"trainer-{number}-{stage}.safetensors"


def _sample(sequence: ComparedSequence) -> TrainSample:
    ids = np.asarray(sequence.ids, np.int32)
    zeros = np.zeros(len(ids), np.float32)
    return TrainSample(ids, zeros, np.zeros(len(ids), np.int32), zeros)


def _report(model: Any, folder: Path, sequences: list[ComparedSequence]) -> None:
    """Prints the table. Raises SelftestFailed if an operation differs by more than rounding."""
    from megatron.core import parallel_state as mpu
    from safetensors.torch import load_file

    stages = range(mpu.get_pipeline_model_parallel_world_size())
    passes = read_passes(folder / files.ENGINE_FOLDER, [s.ids for s in sequences])
    types = [model.config.params_dtype, *(t.dtype for t in passes[0].values())]
    resolution = max(torch.finfo(dtype).eps for dtype in types)
    comparison = Comparison(model.shape.num_layers, resolution, model.config.moe_router_topk)
    decoded, prefilled, trained = [], [], []
    for number, (sequence, engine) in enumerate(zip(sequences, passes, strict=True)):
        trainer: dict[str, Tensor] = {}
        for stage in stages:
            trainer |= load_file(_path(folder, number, stage))
        trained.append(trainer.pop("logprobs").double())
        prefilled.append(torch.tensor(sequence.prefilled, dtype=torch.float64))
        decoded.append(torch.tensor(sequence.decoded, dtype=torch.float64))
        comparison.add(engine, trainer, len(sequence.ids))
    lines = [
        *comparison.table(),
        "(root mean square of the difference over that of the engine's output; * more than "
        "rounding explains)",
        _logprob_line("engine's prefill and trainer", prefilled, trained),
        _logprob_line(
            "engine's decoding and its prefill",
            decoded,
            [p[-len(d) :] for p, d in zip(prefilled, decoded, strict=True)],
        ),
    ]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
    first = comparison.first_beyond_rounding()
    if first is None:
        sys.stdout.write("engine and trainer agree within rounding in all compared operations\n")
        return
    difference = comparison.differences[first]
    raise SelftestFailed(
        f"the first operation that differs by more than rounding is {first}: by "
        f"{difference.relative:.2g} of its root mean square (rounding explains "
        f"{comparison.bound(first):.2g}), at most {difference.largest:.3g}",
        f"check {LOOK_AT[first.split(': ')[-1]]}",
    )


def _logprob_line(what: str, left: list[Tensor], right: list[Tensor]) -> str:
    difference = (torch.cat(left) - torch.cat(right)).abs()
    return (
        f"logprobs of {what}: mean absolute difference {difference.mean():.3g}, largest "
        f"{difference.max():.3g}, {len(difference)} tokens"
    )


if __name__ == "__main__":
    run = partial(_main, Path(sys.argv[1]), Path(sys.argv[2]))
    processes.main(run, unwind=False)
