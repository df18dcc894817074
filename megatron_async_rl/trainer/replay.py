"""`torchrun -m megatron_async_rl.trainer.replay CONFIG BATCH...`: trains one step on saved batches.

Needs neither controller nor servers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load
from megatron_async_rl.errors import DataError
from megatron_async_rl.storage import batches


def _replay(config_path: Path, paths: list[Path]) -> None:
    settings = load.load(config_path)
    loaded = [batches.load(path) for path in paths]
    [version, *others] = {version for version, _ in loaded}
    if others:
        raise DataError(
            f"the files are of versions {sorted([version, *others])}; give the files of one step"
        )
    patches.prepare_megatron()
    import torch.distributed as dist  # after the patches: they import Megatron
    from megatron.core import parallel_state as mpu

    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.model import build

    parallel.init_parallel(settings)
    samples = [sample for _, part in loaded for sample in part]
    share = samples[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    stats = step.train_step(build.build(settings), share, version, settings)
    if dist.get_rank() == 0:
        sys.stdout.write(f"{len(samples)} samples of version {version} trained\n")
        sys.stdout.writelines(f"  {name:38} {value:.6g}\n" for name, value in sorted(stats.items()))
        sys.stdout.flush()


if __name__ == "__main__":
    config, *paths = map(Path, sys.argv[1:])
    processes.main(lambda: _replay(config, paths), unwind=False)
