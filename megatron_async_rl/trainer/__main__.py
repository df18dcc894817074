"""`python -m megatron_async_rl.trainer RUN_DIR` under torchrun: one trainer rank.

This loop is the whole training: get a batch, train on it, send the new weights to the servers,
save. A step that was not saved before a crash is repeated with the same batch, which the controller
keeps.
"""

import logging
import sys
from pathlib import Path

from megatron_async_rl import patches, processes
from megatron_async_rl.config import load
from megatron_async_rl.errors import DataError

logger = logging.getLogger(__name__)


def _train(run_dir: Path) -> None:
    config = load.load(run_dir / "config.yaml")
    patches.prepare_megatron()  # before the imports below, which import megatron.core
    from megatron_async_rl.trainer import parallel, step
    from megatron_async_rl.trainer.algorithms import objectives
    from megatron_async_rl.trainer.checkpoint import export
    from megatron_async_rl.trainer.checkpoint.checkpoint import Checkpointer
    from megatron_async_rl.trainer.controller_client import ControllerClient
    from megatron_async_rl.trainer.model import build
    from megatron_async_rl.trainer.probe import Probe
    from megatron_async_rl.weights.publish import WeightPublisher

    objectives.load(config.algorithm)  # before anything is generated: it may be a user's
    parallel.init_parallel(config)
    model = build.build(config)
    controller = ControllerClient(config, run_dir)
    publisher = WeightPublisher(model.modules, model.shape, config, controller.source_socket)
    checkpointer = Checkpointer(model, config, run_dir, controller.report_checkpoint)

    def export_to(folder: str, is_needed: bool = False) -> None:
        source = Path(config.model.path)
        try:
            export.export_hf(model.modules, model.shape, source, run_dir / folder)
        except DataError as e:  # on all ranks, such as of a full disk
            if is_needed:
                raise
            logger.error("%s; training continues without it", e)

    version = checkpointer.load()
    if not controller.run_is_over:
        publisher.publish(version)  # the servers start from these weights
    elif version < config.run.steps:
        raise DataError(
            f"{run_dir}: the run is finished, but its last checkpoint is damaged: its policy "
            "cannot be exported",
            "restore the checkpoint from a copy, or raise run.steps to continue from the one "
            "before",
        )
    while version < config.run.steps:
        # Waits until the batch is complete; meanwhile new servers may ask for the weights.
        samples = controller.next_batch(version, publisher.publish)
        if samples is None:  # the run is being stopped
            checkpointer.save(version)
            break
        probe = Probe(config.monitor.mismatch_probe_samples, model.device)
        metrics = step.train_step(model, samples, version, config, probe)
        version += 1
        controller.report_step(version, metrics, probe.logprobs())
        if version == config.run.steps:
            checkpointer.save(version)  # before `publish` tells the controller that all is done
        publisher.publish(version)  # interrupt generation, reshard, send, verify, resume
        checkpointer.step(version)
        if config.run.export_every and version % config.run.export_every == 0:
            export_to(f"policy-v{version}")
    controller.await_commit()
    if version >= config.run.steps:
        export_to("policy", is_needed=True)
    checkpointer.close()
    controller.close()


if __name__ == "__main__":
    # No unwinding at SIGTERM: a rank has nothing to undo and may be stuck in a collective.
    processes.main(lambda: _train(Path(sys.argv[1])), unwind=False)
