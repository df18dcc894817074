"""Checks a run's folder after the fact: the journal and the sample log against the promises, by counting anew.

Nothing of the core is used here: a mistake there must show. `python -m megatron_async_rl audit RUN_DIR` prints the result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from megatron_async_rl.controller.core.events import (
    BatchSelected,
    BatchTrained,
    ControllerStarted,
    GroupAdmitted,
    GroupDropped,
    LeaseGranted,
    PartialSaved,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, read_events
from megatron_async_rl.errors import DataError
from megatron_async_rl.observability.sample_log import SAMPLES_FILE, read_samples
from megatron_async_rl.storage import checkpoints


@dataclass
class Audit:
    """Counts of groups, and every breach of a promise in words."""

    lives: int = 0  # of the controller
    admitted: int = 0
    trained: int = 0
    pending: int = 0
    leases: int = 0
    kept_partials: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicated: int = 0  # groups or samples that count more than once
    lost: int = 0  # groups neither trained nor dropped nor pending in the order of the stream
    max_staleness: int = 0
    breaches: list[str] = field(default_factory=list)

    def line(self, eta: int) -> str:
        dropped = (
            ",".join(f"{reason}:{count}" for reason, count in sorted(self.dropped.items())) or "0"
        )
        return (
            f"lives={self.lives} admitted={self.admitted} trained={self.trained} pending={self.pending} "
            f"dropped_with_reason={dropped} lost={self.lost} duplicated={self.duplicated} "
            f"max_staleness={self.max_staleness}/{eta}"
        )


def audit(run_dir: Path, eta: int, until: int | None = None) -> Audit:
    """Reads the whole journal, the sample log and the manifests; `until`: as things stood after that many facts."""
    result = Audit()
    state: dict[int, str] = {}
    batches: dict[int, list[int]] = {}
    version = 0
    returned: Counter[tuple[int, int]] = Counter()
    judged: Counter[tuple[int, int]] = Counter()
    for fact in read_events(run_dir / JOURNAL_FILE, until):
        if isinstance(fact, ControllerStarted):
            result.lives += 1
        elif isinstance(fact, GroupAdmitted):
            result.admitted += 1
            if fact.group_id in state:
                result.duplicated += 1
                result.breaches.append(f"group {fact.group_id} was admitted twice")
            state[fact.group_id] = "pending"
        elif isinstance(fact, BatchSelected):
            if fact.version in batches:
                result.duplicated += 1
                result.breaches.append(f"version {fact.version} has two batches")
            batches[fact.version] = fact.group_ids
            for group_id in fact.group_ids:
                _move(result, state, group_id, "pending", f"batch {fact.version}")
        elif isinstance(fact, BatchTrained):
            if fact.version != version + 1:
                result.breaches.append(
                    f"version {fact.version} was trained after version {version}"
                )
            version = fact.version
            for group_id in batches.get(version - 1, []):
                _move(result, state, group_id, f"batch {version - 1}", "trained")
        elif isinstance(fact, GroupDropped):
            _move(result, state, fact.group_id, "pending", f"dropped {fact.reason}")
            result.dropped[fact.reason] += 1
        elif isinstance(fact, SampleReturned):
            returned[fact.group_id, fact.index] += 1
        elif isinstance(fact, SampleScored):
            judged[fact.group_id, fact.index] += 1
        else:
            result.leases += isinstance(fact, LeaseGranted)
            result.kept_partials += isinstance(fact, PartialSaved)
    for what, counts in (("returned", returned), ("judged", judged)):
        twice = [key for key, count in counts.items() if count > 1]
        result.duplicated += len(twice)
        result.breaches += [f"sample {key} was {what} twice" for key in twice]
    ends = Counter(end.split()[0] for end in state.values())
    result.trained, result.pending = ends["trained"], ends["pending"] + ends["batch"]
    result.lost = result.admitted - result.trained - result.pending - result.dropped.total()
    if result.lost:
        result.breaches.append(f"{result.lost} groups are unaccounted for")
    _check_samples(run_dir, eta, batches, until is None, result)
    if until is None:
        _check_manifests(run_dir, version, result)
    return result


def _move(result: Audit, state: dict[int, str], group_id: int, source: str, target: str) -> None:
    if state.get(group_id) != source:
        result.breaches.append(f"group {group_id} went to {target!r} from {state.get(group_id)!r}")
        result.duplicated += state.get(group_id, "").startswith(("trained", "dropped"))
    state[group_id] = target


def _check_samples(
    run_dir: Path, eta: int, batches: dict[int, list[int]], whole: bool, result: Audit
) -> None:
    """Staleness of every trained token, and that what was trained is what the journal says (`whole`, or its beginning)."""
    if not (run_dir / SAMPLES_FILE).exists():
        result.breaches += [
            f"{SAMPLES_FILE} is missing, and {len(batches)} batches were trained"
        ] * bool(batches)
        return
    seen: Counter[tuple[int, int]] = Counter()
    by_version: dict[int, set[int]] = defaultdict(set)
    for line in read_samples(run_dir):
        if not whole and line.version not in batches:
            continue
        seen[line.group_id, line.index] += 1
        by_version[line.version].add(line.group_id)
        lags = [line.version - version for version, _ in line.versions]
        result.max_staleness = max([result.max_staleness, *lags])
        if lags and (max(lags) > eta or min(lags) < 0):
            result.breaches.append(
                f"group {line.group_id} was trained on {line.version} with tokens {line.versions}"
            )
        if any(a > b for (a, _), (b, _) in pairwise(line.versions)):
            result.breaches.append(
                f"the versions of group {line.group_id} go back: {line.versions}"
            )
    twice = [key for key, count in seen.items() if count > 1]
    result.duplicated += len(twice)
    result.breaches += [f"sample {key} was trained twice" for key in twice]
    for version, groups in by_version.items():
        if groups != set(batches.get(version, [])):
            result.breaches.append(f"batch {version} in the sample log differs from the journal's")


def _check_manifests(run_dir: Path, version: int, result: Audit) -> None:
    for manifest in checkpoints.manifests(run_dir):
        if manifest.version > version:
            result.breaches.append(
                f"checkpoint {manifest.folder} is newer than the journal's version {version}"
            )


def run(run_dir: Path, eta: int) -> int:
    """Prints the audit; 1 when a promise was broken."""
    if not (run_dir / JOURNAL_FILE).exists():
        raise DataError(f"{run_dir} has no {JOURNAL_FILE}: it is not the folder of a run")
    result = audit(run_dir, eta)
    print(result.line(eta))
    for breach in result.breaches:
        print(f"breach: {breach}")
    return int(bool(result.breaches))
