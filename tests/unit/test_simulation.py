"""A thousand simulated runs, each repeatable by its seed; and seeded bugs that must be found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from seeded_bugs import BUGS, Bug
from simulation import GuaranteeViolation, simulate

from megatron_async_rl.errors import Error, LedgerError

NUM_SEEDS = 1000
BUG_SEEDS = 150  # a bug must show within so many seeds


def test_all_simulated_runs_keep_every_guarantee() -> None:
    total: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        try:
            result = simulate(seed)
        except (AssertionError, Error) as e:
            raise AssertionError(f"seed {seed}: {e}") from e
        total.update(
            faults=result.faults,
            crashes=result.crashes,
            dropped=result.dropped,
            trained=result.trained,
        )
        total["stale"] = max(total["stale"], result.max_staleness)
    print(f"{NUM_SEEDS} seeds: {dict(total)}")
    assert total["faults"] > NUM_SEEDS and total["crashes"] > NUM_SEEDS  # there were many faults
    assert total["trained"] > 10 * total["dropped"] / 5 and total["stale"] >= 3


def test_same_seed_repeats_the_run() -> None:
    assert simulate(17) == simulate(17)


def first_violation(restore: Callable | None = None) -> str:
    """Returns the first error of the simulation and its seed; empty if there is none."""
    for seed in range(BUG_SEEDS):
        try:
            simulate(seed, restore)
        except (GuaranteeViolation, LedgerError, Error, KeyError, ValueError, TypeError) as e:
            return f"seed {seed}: {type(e).__name__}: {e}"
    return ""


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_seeded_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    caught = first_violation()
    print(f"{bug.__name__}: {caught}")
    assert caught, bug.__doc__


def test_torn_journal_is_caught() -> None:
    """Events are missing in the middle: no crash leaves that, but a bad copy of the file can."""
    assert first_violation(
        lambda events: events[: len(events) // 2] + events[len(events) // 2 + 3 :]
    )
