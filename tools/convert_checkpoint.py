#!/usr/bin/env python3
"""Converts a Hugging Face folder to a Megatron checkpoint (torch_dist) and back, in any layout.

    convert="torchrun --nproc-per-node 8 tools/convert_checkpoint.py"
    $convert to-megatron CONFIG OUT [key=value ...]
    $convert to-hf CONFIG CHECKPOINT OUT [key=value ...]

CONFIG is the YAML of a run: model.path names the Hugging Face folder (to-hf needs only its
config.json and tokenizer), `megatron:` and trainer.data_parallel_size give the layout, and
trainer.precision the type in memory. A checkpoint may be read in another layout than it was written
in. No process holds the whole model: a rank holds its own shard and, while it writes a Hugging Face
file, at most FILE_BYTES of trainer/checkpoint/export.py more. A checkpoint of a run works too; its
optimizer state is not read.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_async_rl.patches import prepare_megatron

prepare_megatron()

import msgspec
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_async_rl.config import load as configuration
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError, Error
from megatron_async_rl.trainer import parallel
from megatron_async_rl.trainer.checkpoint.export import export_hf
from megatron_async_rl.trainer.model import build


def to_megatron(config: Config, out: Path) -> None:
    parallel.init_parallel(config)
    _, _, modules = build.build_modules(config)
    partial = out.with_name(f".{out.name}.partial")
    if dist.get_rank() == 0:
        if out.exists():
            raise DataError(f"{out} exists already; remove it or choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(modules), str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(out)


def to_hf(config: Config, checkpoint: Path, out: Path) -> None:
    if not (checkpoint / "metadata.json").is_file():
        raise DataError(
            f"{checkpoint} is no Megatron checkpoint: it has no metadata.json; "
            "name the folder that contains that file"
        )
    parallel.init_parallel(config)
    blank = msgspec.structs.replace(
        config, model=msgspec.structs.replace(config.model, random_init=True)
    )
    _, shape, modules = build.build_modules(blank)
    state = dist_checkpointing.load(_state(modules), str(checkpoint))
    for number, module in enumerate(modules):
        module.load_state_dict(state[_key(modules, number)])
    export_hf(modules, shape, config.model.path, out)


def _state(modules: list[build.GPTModel]) -> dict[str, object]:
    return {
        _key(modules, number): module.sharded_state_dict() for number, module in enumerate(modules)
    }


def _key(modules: list[build.GPTModel], number: int) -> str:
    return "model" if len(modules) == 1 else f"model{number}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    for name, paths in (("to-megatron", ["out"]), ("to-hf", ["checkpoint", "out"])):
        command = commands.add_parser(name)
        command.add_argument("config", type=Path)
        for path in paths:
            command.add_argument(path, type=Path)
        command.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.command == "to-megatron":
            to_megatron(config, arguments.out)
        else:
            to_hf(config, arguments.checkpoint, arguments.out)
    except Error as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
