"""`audit`: recomputes sample accounting and staleness of a run from its journal and sample log.

It shares no code with the controller's core, so that an error there shows here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_async_rl.controller.core import events
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.sample_log import SAMPLES_FILE, SampleLine, read_samples
from megatron_async_rl.storage import checkpoints


@dataclass
class Audit:
    """Counts of groups, and every violation of an invariant as text."""

    epochs: int = 0  # starts of the controller
    admitted: int = 0
    trained: int = 0
    pending: int = 0
    leases: int = 0
    saved_partials: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicated: int = 0  # groups or samples that were counted more than once
    lost: int = 0  # groups that are neither trained nor dropped nor pending
    max_staleness: int = 0
    breaches: list[str] = field(default_factory=list)

    def line(self, max_staleness: int) -> str:
        dropped = ",".join(f"{reason}:{count}" for reason, count in sorted(self.dropped.items()))
        return (
            f"epochs={self.epochs} admitted={self.admitted} trained={self.trained} "
            f"pending={self.pending} dropped_with_reason={dropped or 0} lost={self.lost} "
            f"duplicated={self.duplicated} max_staleness={self.max_staleness}/{max_staleness}"
        )


def run(run_dir: Path, max_staleness: int) -> int:
    """Prints the audit. Returns 1 if an invariant is violated."""
    if not (run_dir / JOURNAL_FILE).exists():
        raise DataError(f"{run_dir} has no {JOURNAL_FILE}: give the run.dir of a run")
    result = audit(run_dir, max_staleness)
    print(result.line(max_staleness))
    for breach in result.breaches:
        print(f"breach: {breach}")
    return int(bool(result.breaches))


def audit(run_dir: Path, eta: int, until: int | None = None) -> Audit:
    """Reads journal, sample log and checkpoints. With `until`, only that many journal events.

    eta: staleness.max_staleness.
    """
    journal = _Journal(Audit())
    for event in read_events(run_dir / JOURNAL_FILE, until):
        journal.add(event)
    result = journal.finish()
    _check_samples(run_dir, eta, journal.batches, until is None, result)
    if until is None:
        for manifest in checkpoints.list_manifests(run_dir):
            if manifest.version > journal.version:
                result.breaches.append(
                    f"checkpoint {manifest.folder} is newer than the journal's version "
                    f"{journal.version}"
                )
    return result


class _Journal:
    """The state of every group, followed event by event."""

    def __init__(self, result: Audit) -> None:
        self.result = result
        self.version = 0
        self.batches: dict[int, list[int]] = {}  # group ids by version
        self._state: dict[int, str] = {}  # by group
        self._returned: Counter[tuple[int, int]] = Counter()  # by (group, index)
        self._scored: Counter[tuple[int, int]] = Counter()

    def add(self, event: events.JournalEvent) -> None:
        result = self.result
        match event:
            case events.ControllerStarted():
                result.epochs += 1
            case events.GroupAdmitted(group_id=group_id):
                result.admitted += 1
                if group_id in self._state:
                    self._duplicate(f"group {group_id} was admitted twice")
                self._state[group_id] = "pending"
            case events.BatchSelected(version=version, group_ids=group_ids):
                if version in self.batches:
                    self._duplicate(f"version {version} has two batches")
                self.batches[version] = group_ids
                for group_id in group_ids:
                    self._move(group_id, "pending", f"batch {version}")
            case events.BatchTrained(version=version):
                if version != self.version + 1:
                    result.breaches.append(
                        f"version {version} was trained after version {self.version}"
                    )
                self.version = version
                for group_id in self.batches.get(version - 1, []):
                    self._move(group_id, f"batch {version - 1}", "trained")
            case events.GroupDropped(group_id=group_id, reason=reason):
                self._move(group_id, "pending", f"dropped {reason}")
                result.dropped[reason] += 1
            case events.SampleReturned(group_id=group_id, index=index):
                self._returned[group_id, index] += 1
            case events.SampleScored(group_id=group_id, index=index):
                self._scored[group_id, index] += 1
            case events.LeaseGranted():
                result.leases += 1
            case events.PartialSaved():
                result.saved_partials += 1

    def finish(self) -> Audit:
        result = self.result
        for action, counts in (("returned", self._returned), ("scored", self._scored)):
            for key in (key for key, count in counts.items() if count > 1):
                self._duplicate(f"sample {key} was {action} twice")
        ends = Counter(state.split()[0] for state in self._state.values())
        result.trained, result.pending = ends["trained"], ends["pending"] + ends["batch"]
        result.lost = result.admitted - result.trained - result.pending - result.dropped.total()
        if result.lost:
            result.breaches.append(f"{result.lost} groups are unaccounted for")
        return result

    def _move(self, group_id: int, source: str, target: str) -> None:
        state = self._state.get(group_id)
        if state != source:
            self.result.breaches.append(f"group {group_id} went to {target!r} from {state!r}")
            self.result.duplicated += (state or "").startswith(("trained", "dropped"))
        self._state[group_id] = target

    def _duplicate(self, breach: str) -> None:
        self.result.duplicated += 1
        self.result.breaches.append(breach)


def _check_samples(
    run_dir: Path, eta: int, batches: dict[int, list[int]], whole: bool, result: Audit
) -> None:
    """Checks the staleness of every token, and that the log's batches are those of the journal.

    Unless `whole`, the sample log may have later batches than `batches`.
    """
    if not (run_dir / SAMPLES_FILE).exists():
        if batches:
            result.breaches.append(
                f"{SAMPLES_FILE} is missing, and {len(batches)} batches were trained"
            )
        return
    seen: Counter[tuple[int, int]] = Counter()
    by_version: dict[int, set[int]] = defaultdict(set)
    for line in read_samples(run_dir):
        if whole or line.version in batches:
            seen[line.group_id, line.index] += 1
            by_version[line.version].add(line.group_id)
            _check_staleness(line, eta, result)
    twice = [key for key, count in seen.items() if count > 1]
    result.duplicated += len(twice)
    result.breaches += [f"sample {key} was trained twice" for key in twice]
    for version, groups in by_version.items():
        if groups != set(batches.get(version, [])):
            result.breaches.append(f"batch {version} in the sample log differs from the journal's")


def _check_staleness(line: SampleLine, eta: int, result: Audit) -> None:
    lags = [line.version - version for version, _ in line.versions]
    result.max_staleness = max([result.max_staleness, *lags])
    if lags and (max(lags) > eta or min(lags) < 0):
        result.breaches.append(
            f"group {line.group_id} was trained on {line.version} with tokens {line.versions}"
        )
    if any(a > b for (a, _), (b, _) in pairwise(line.versions)):
        result.breaches.append(f"the versions of group {line.group_id} decrease: {line.versions}")
