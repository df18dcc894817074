"""Journal events and checkpoint folders for tests of the files of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from core_builders import finish_lease, generated, join_workers, make_core, make_partial

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import SendBatch
from megatron_async_rl.controller.journal.events import BatchSelected, JournalEvent, SampleReturned
from megatron_async_rl.controller.journal.journal import Journal
from megatron_async_rl.observability import sample_log
from megatron_async_rl.observability.sample_log import TrainedGroup
from megatron_async_rl.protocol.messages import PartialSample, StepDone
from megatron_async_rl.protocol.types import Sample
from megatron_async_rl.storage import checkpoints

NUM_TOKENS = 1000


def journal_events(num_steps: int = 2) -> list[JournalEvent]:
    """Returns the events of a core that has trained so many steps and has work in progress."""
    core = make_core(max_staleness=1)
    leases = join_workers(core)
    for version in range(num_steps):
        actions = []
        for lease in leases:
            actions += finish_lease(core, lease, version)
        actions += core.handle(inputs.BatchRequested(0, version), 0)
        assert any(isinstance(action, SendBatch) for action in actions)
        core.handle(inputs.Received("trainer-0", StepDone(version + 1, {})), 0)
        leases = [
            a.message
            for a in core.handle(inputs.ServerUpdated("rollout-0", version=version + 1), 0)
            if hasattr(a.message, "indices")
        ]
    core.handle(inputs.Received("rollout-0", generated(leases[0], 0, num_steps)), 0)
    core.handle(
        inputs.Received("rollout-0", PartialSample(leases[0].key(1), make_partial(num_steps))), 0
    )
    return core.state.take_events()


def write_checkpoint(
    run_dir: Path, version: int, journal_seq: int = 1
) -> checkpoints.CheckpointManifest:
    """Writes and commits a checkpoint of two ranks with a small file each."""
    folder = run_dir / checkpoints.FOLDER / checkpoints.folder_name(version)
    folder.mkdir(parents=True)
    for rank in (0, 1):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes([version, rank]) * 500)
        checkpoints.write_digests(folder, rank, [f"__{rank}_0.distcp"])
    return checkpoints.commit(run_dir, version, folder.name, journal_seq, 7)


def sample_returned(group_id: int) -> SampleReturned:
    """Returns an event with a sample of NUM_TOKENS tokens, all of which depend on the group.

    The versions are one run, so the arrays take 8 bytes a token.
    """
    ids = np.arange(NUM_TOKENS, dtype=np.int32) + group_id * NUM_TOKENS
    versions = np.full(NUM_TOKENS, group_id, np.int32)
    return SampleReturned(
        group_id, 0, Sample(ids, -ids.astype(np.float32), versions, "stop", f"text {group_id}")
    )


def write_run_folder(run_dir: Path, keep_wal: bool) -> None:
    """Writes journal, sample log and two checkpoints of a run that has trained three steps.

    The samples of the first batch are pruned. `keep_wal`: as a killed controller leaves it, with
    all events still in the WAL; otherwise the run has ended.
    """
    written = run_dir.with_name(run_dir.name + ".written")
    written.mkdir()
    events = journal_events(3)
    batches = {event.version: event for event in events if isinstance(event, BatchSelected)}
    samples = {(e.group_id, e.index): e.sample for e in events if isinstance(e, SampleReturned)}
    lines = []
    for version, batch in batches.items():
        for group_id in batch.group_ids:
            members = [sample for (g, _), sample in sorted(samples.items()) if g == group_id]
            ones = [1.0] * len(members)
            group = TrainedGroup(group_id, str(group_id), members, ones, ones)
            lines += [sample_log.sample_line(version, group, i, True) for i in range(len(members))]
    log = b"".join(map(sample_log.encode_line, lines))
    (written / sample_log.SAMPLES_FILE).write_bytes(log)
    for version in (2, 3):
        write_checkpoint(written, version, journal_seq=len(events) // 2)
    journal = Journal(written / "journal.sqlite")
    for start in range(0, len(events), 8):  # several commits
        journal.append(events[start : start + 8])
        journal.flush().result(10)
    journal.prune(batches[0].group_ids)
    journal.flush().result(10)
    if keep_wal:
        shutil.copytree(written, run_dir, ignore=shutil.ignore_patterns("*-shm"))
        journal.close()
    else:
        journal.close()
        written.rename(run_dir)
