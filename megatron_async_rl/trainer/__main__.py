"""`torchrun ... -m megatron_async_rl.trainer RUN_DIR`: one trainer rank. The loop to read first."""

import sys
from pathlib import Path

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load


def _train(run_dir: Path) -> None:
    settings = load.load(run_dir / "config.yaml")
    patches.prepare_megatron()
    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.checkpoint import export
    from megatron_async_rl.trainer.checkpoint.checkpoint import Checkpointer
    from megatron_async_rl.trainer.controller_client import ControllerLink
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.weights.publish import WeightPublisher

    parallel.init_parallel(settings)
    policy = build.build(settings)
    controller = ControllerLink(settings, run_dir)
    publisher = WeightPublisher(
        policy.modules, policy.shape, settings, controller.socket if controller.is_source else None
    )

    saver = Checkpointer(policy, settings, run_dir, controller.saved)

    first = saver.load()  # the controller knows what was trained since, and has us do it again
    publisher.publish(first)
    for version in range(first, settings.run.steps):
        samples = controller.next_batch(
            version, publisher.publish
        )  # waits for enough fresh ones; all ranks get theirs
        if samples is None:
            saver.save(version)
            saver.close()
            controller.close()
            return
        stats = step.train_step(policy, samples, version, settings)
        controller.report(version + 1, stats)
        if version + 1 == settings.run.steps:
            saver.save(version + 1)  # before the controller learns that all is done
        publisher.publish(version + 1)  # interrupt, reshard, send, verify, resume
        saver.step(version + 1)
        if settings.run.export_every and (version + 1) % settings.run.export_every == 0:
            export.save_hf(policy, Path(settings.model.path), run_dir / f"policy-v{version + 1}")
    export.save_hf(policy, Path(settings.model.path), run_dir / "policy")
    saver.close()
    controller.close()


if __name__ == "__main__":
    processes.main(
        lambda: _train(Path(sys.argv[1])), unwind=False
    )  # nothing to undo; it may be stuck in a collective
