"""`audit`: recomputes sample accounting and staleness of a run from its journal and sample log, and
verifies the checksums of all files that a run continues from.

It shares no code with the controller's core, so that it reveals errors of the core. It changes
nothing and continues after a damage; every damaged file is named, with its lost content.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_async_rl.config.load import load_run
from megatron_async_rl.controller.evaluation import records
from megatron_async_rl.controller.journal import events, reader
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE
from megatron_async_rl.data.digests import read_digests
from megatron_async_rl.errors import DataError
from megatron_async_rl.launcher.checks.weights import check_weights
from megatron_async_rl.observability.sample_log import SAMPLES_FILE, SampleLine, read_samples
from megatron_async_rl.observability.status import STATUS_FILE, read_status
from megatron_async_rl.storage import checkpoints, exported, hook_digests, model_digests, snapshots

UNKNOWN = 1 << 30  # max_staleness if config.yaml cannot be read


@dataclass
class Audit:
    """Counts of groups, and every violation of an invariant as text."""

    epochs: int = 0  # starts of the controller
    admitted: int = 0
    trained: int = 0
    pending: int = 0
    leases: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicated: int = 0  # groups or samples that were counted more than once
    lost: int = 0  # groups that are neither trained nor dropped nor pending
    max_staleness: int = 0
    staleness_limit: int = 0  # the highest that applied to a step
    breaches: list[str] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)  # each names a file and its lost content
    notes: list[str] = field(default_factory=list)  # unusual, but possible without damage

    def line(self) -> str:
        dropped = ",".join(f"{reason}:{count}" for reason, count in sorted(self.dropped.items()))
        return (
            f"epochs={self.epochs} admitted={self.admitted} trained={self.trained} "
            f"pending={self.pending} dropped_with_reason={dropped or 0} lost={self.lost} "
            f"duplicated={self.duplicated} max_staleness={self.max_staleness}/"
            f"{self.staleness_limit}"
        )


def run(run_dir: Path, max_staleness: int | None = None) -> int:
    """Prints the audit. Returns 1 if an invariant is violated or a file is damaged.

    `max_staleness`: of steps whose journal does not record it; by default the one of config.yaml.
    """
    if not (run_dir / JOURNAL_FILE).exists():
        raise DataError(f"{run_dir} has no {JOURNAL_FILE}", "give the run.dir of a run")
    damages = []
    if max_staleness is None:
        try:
            max_staleness = load_run(run_dir).staleness.max_staleness
        except DataError as e:
            max_staleness = UNKNOWN
            damages.append(str(e))
    result = audit(run_dir, max_staleness)
    result.damages += damages
    print(result.line())
    texts = {"breach": result.breaches, "damage": result.damages, "note": result.notes}
    for kind, found in texts.items():
        for text in found:
            print(f"{kind}: {text}")
    return int(bool(result.breaches or result.damages))


def audit(run_dir: Path, eta: int, until: int | None = None) -> Audit:
    """Reads journal, sample log, checkpoints and snapshots; raises nothing if they are damaged.

    eta: staleness.max_staleness of steps whose journal does not record it; a step is judged by the
    setting when its batch was selected. With `until`, reads only that many journal events and the
    sample log.
    """
    result = Audit()
    journal = _Journal(result, eta)
    path = run_dir / JOURNAL_FILE
    try:
        for event in reader.read_events(path, until, result.damages.append):
            journal.add(event)
        if until is None:
            _check_journal_file(path, result)
    except DataError as e:
        result.damages.append(str(e))
    journal.finish()
    _check_samples(run_dir, journal, until is None, result)
    if until is None:
        _check_checkpoints(run_dir, journal.version, result)
        _check_snapshots(run_dir, result)
        _check_records(run_dir, result)
    return result


def _check_journal_file(path: Path, result: Audit) -> None:
    if damage := reader.find_mark_damage(path):
        result.damages.append(damage)
    with closing(reader.connect_to_read(path)) as db:
        try:
            damage = reader.find_structural_damage(db)
        except sqlite3.DatabaseError as e:
            damage = str(e)
    if damage:
        result.damages.append(f"{path}: {damage}; lost: what the damaged pages held")


def _check_checkpoints(run_dir: Path, version: int, result: Audit) -> None:
    """Checks every manifest and every file that one lists. `version`: of the journal."""
    folder, names = run_dir / checkpoints.FOLDER, set()
    for path in checkpoints.damaged_manifests(run_dir):
        names.add(path.stem)
        result.damages.append(f"{path} does not match its digest; lost: checkpoint {path.stem}")
    for manifest in checkpoints.list_manifests(run_dir):
        names.add(manifest.folder)
        if manifest.version > version:
            result.breaches.append(
                f"checkpoint {manifest.folder} is newer than the journal's version {version}"
            )
        damages = list(checkpoints.find_all_damage(run_dir, manifest))
        if (folder / f"{manifest.folder}.json").exists():  # not pruned meanwhile
            lost = f"lost: checkpoint {manifest.folder}"
            result.damages += [f"{damage}; {lost}" for damage in damages]
    for path in sorted(folder.glob("v*")):
        if path.is_dir() and path.name not in names:
            result.notes.append(f"{path} has no manifest: it is unfinished, and not used")


def _check_snapshots(run_dir: Path, result: Audit) -> None:
    for path in sorted((run_dir / snapshots.FOLDER).glob("v*")):
        snapshot = snapshots.read(path)
        damage = snapshots.find_damage(snapshot) if snapshot else f"{path} has no valid manifest"
        if damage and path.exists():  # not pruned meanwhile
            result.damages.append(f"{damage}; lost: snapshot {path.name}, which is written again")


def _check_records(run_dir: Path, result: Audit) -> None:
    """Checks the small files that the next start, `status` and `eval` read."""
    checks: tuple[Callable[[Path], object], ...] = (
        read_digests,
        model_digests.read,
        hook_digests.read,
        read_status,
    )
    for read in checks:
        try:
            read(run_dir)
        except DataError as e:
            if read is not read_status or (run_dir / STATUS_FILE).exists():
                result.damages.append(str(e))
    for path, error in records.damaged_results(run_dir):
        result.damages.append(f"{path} is damaged: {error}; lost: the result of an evaluation")
    for folder in sorted(run_dir.glob("policy*")):
        if not (folder / exported.DIGESTS_FILE).exists():
            result.notes.append(
                f"{folder} has no {exported.DIGESTS_FILE}: it is of an earlier version of this "
                "program, or was changed; its files are checked for their lengths only"
            )
            try:
                check_weights(sorted(folder.glob("*.safetensors")), False, "")
            except DataError as e:
                result.damages.append(f"{e}; lost: the exported policy")
            continue
        damages = list(exported.find_damage(folder))
        result.damages += [f"{damage}; lost: the exported policy" for damage in damages]


class _Journal:
    """The state of every group, followed event by event."""

    def __init__(self, result: Audit, eta: int) -> None:
        self.result = result
        self._eta = eta  # since the last start of the controller
        self._eta_if_unknown = eta
        self._etas: dict[int, int] = {}  # by version of a batch
        self.version = 0
        self.batches: dict[int, list[int]] = {}  # group ids by version
        self._state: dict[int, str] = {}  # by group
        self._returned: Counter[tuple[int, int]] = Counter()  # by (group, index)
        self._scored: Counter[tuple[int, int]] = Counter()
        self._indices: dict[int, set[int]] = defaultdict(set)  # of the scored samples, by group

    def add(self, event: events.JournalEvent) -> None:
        result = self.result
        match event:
            case events.ControllerStarted(max_staleness=recorded):
                result.epochs += 1
                self._eta = self._eta_if_unknown if recorded is None else recorded
            case events.GroupAdmitted(group_id=group_id):
                result.admitted += 1
                if group_id in self._state:
                    self._duplicate(f"group {group_id} was admitted twice")
                self._state[group_id] = "pending"
            case events.BatchSelected(version=version, group_ids=group_ids):
                if version in self.batches:
                    self._duplicate(f"version {version} has two batches")
                self.batches[version] = group_ids
                self._etas[version] = self._eta
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
                self._indices[group_id].add(index)
            case events.LeaseGranted():
                result.leases += 1

    def eta_of(self, version: int) -> int:
        """Returns the max_staleness that applied when the batch of `version` was selected."""
        return self._etas.get(version, self._eta)

    def samples_of(self, version: int) -> set[tuple[int, int]]:
        """Returns (group, index) of every sample of a batch."""
        groups = self.batches.get(version, [])
        return {(group_id, index) for group_id in groups for index in self._indices[group_id]}

    def finish(self) -> None:
        result = self.result
        result.staleness_limit = max(self._etas.values(), default=self._eta)
        for action, counts in (("returned", self._returned), ("scored", self._scored)):
            for key in (key for key, count in counts.items() if count > 1):
                self._duplicate(f"sample {key} was {action} twice")
        ends = Counter(state.split()[0] for state in self._state.values())
        result.trained, result.pending = ends["trained"], ends["pending"] + ends["batch"]
        result.lost = result.admitted - result.trained - result.pending - result.dropped.total()
        if result.lost:
            result.breaches.append(f"{result.lost} groups are unaccounted for")

    def _move(self, group_id: int, source: str, target: str) -> None:
        state = self._state.get(group_id)
        if state != source:
            self.result.breaches.append(f"group {group_id} went to {target!r} from {state!r}")
            self.result.duplicated += (state or "").startswith(("trained", "dropped"))
        self._state[group_id] = target

    def _duplicate(self, breach: str) -> None:
        self.result.duplicated += 1
        self.result.breaches.append(breach)


def _check_samples(run_dir: Path, journal: _Journal, whole: bool, result: Audit) -> None:
    """Checks the staleness of every token, and that the log's batches are those of the journal.

    Unless `whole`, the sample log may have later batches than the journal was read to.
    """
    path = run_dir / SAMPLES_FILE
    if not path.exists():
        if journal.batches:
            result.breaches.append(
                f"{SAMPLES_FILE} is missing, and {len(journal.batches)} batches were trained"
            )
        return
    seen: Counter[tuple[int, int]] = Counter()
    by_version: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for line in read_samples(run_dir, result.damages.append):
        if whole or line.version in journal.batches:
            seen[line.group_id, line.index] += 1
            by_version[line.version].add((line.group_id, line.index))
            _check_staleness(line, journal.eta_of(line.version), result)
    twice = [key for key, count in seen.items() if count > 1]
    result.duplicated += len(twice)
    result.breaches += [f"sample {key} was trained twice" for key in twice]
    for version, samples in by_version.items():
        expected = journal.samples_of(version)
        if {group_id for group_id, _ in samples} - set(journal.batches.get(version, [])):
            result.breaches.append(f"batch {version} in the sample log differs from the journal's")
        if whole and (lost := len(expected - samples)):
            result.damages.append(
                f"{path}: batch {version} is not complete; lost: {lost} of {len(expected)} samples"
            )
    if whole and (
        absent := [v for v in journal.batches if v < journal.version and v not in by_version]
    ):
        result.notes.append(
            f"{path} lacks the batches of versions {absent}: the disk was full, the controller was "
            "killed before it wrote them, or the file was cut; training does not need them"
        )


def _check_staleness(line: SampleLine, eta: int, result: Audit) -> None:
    lags = [line.version - version for version, _ in line.versions]
    result.max_staleness = max([result.max_staleness, *lags])
    if lags and (max(lags) > eta or min(lags) < 0):
        result.breaches.append(
            f"group {line.group_id} was trained on {line.version} with tokens {line.versions}"
        )
    if any(a > b for (a, _), (b, _) in pairwise(line.versions)):
        result.notes.append(
            f"the versions of group {line.group_id} decrease: {line.versions}; a server that was "
            "behind has continued its sample"
        )
