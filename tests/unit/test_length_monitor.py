"""The length monitor warns when long answers are not trained, for any reason, and only then."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_async_rl.controller.journal.events import (
    BatchSelected,
    GroupDropped,
    JournalEvent,
    PartialSaved,
    SampleReturned,
)
from megatron_async_rl.controller.monitoring.length_monitor import MIN_GROUPS, WINDOW, LengthMonitor
from megatron_async_rl.protocol.types import NOT_GENERATED, Partial, Sample

SHORT, LONG = 100, 1600


def arrays(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    versions = np.asarray([NOT_GENERATED] * 3 + [0] * length, np.int32)
    return np.zeros(len(versions), np.int32), np.zeros(len(versions), np.float32), versions


def returned(group_id: int, *lengths: int) -> list[JournalEvent]:
    return [
        SampleReturned(group_id, i, Sample(*arrays(length), "stop", ""))
        for i, length in enumerate(lengths)
    ]


def trained(group_id: int, *lengths: int) -> list[JournalEvent]:
    return [*returned(group_id, *lengths), BatchSelected(group_id, [group_id])]


def dropped(group_id: int, reason: str, *lengths: int) -> list[JournalEvent]:
    return [*returned(group_id, *lengths), GroupDropped(group_id, reason)]


def played(events: list[JournalEvent], ask_every: int = 1) -> tuple[list[str], LengthMonitor]:
    """Returns the warnings when the monitor is asked after every `ask_every` events."""
    meter, said = LengthMonitor(), []
    for number, fact in enumerate(events):
        meter.saw(fact)
        if number % ask_every == 0:
            meter.check(said.append)
    return said, meter


def test_starved_long_answers_are_warned_about_once() -> None:
    groups = [
        trained(n, SHORT, SHORT) if n % 4 else dropped(n, "stale", LONG, LONG) for n in range(100)
    ]
    said, meter = played([fact for group in groups for fact in group])
    [warning] = said
    assert warning.startswith("long answers are starved: of the last ")
    assert (
        "0% of the longest tenth" in warning
        and "dropped as stale: set staleness.straggler_policy=wait" in warning
    )
    stats = meter.step()
    assert stats["rollout/sampled_tokens_mean"] == pytest.approx(0.75 * SHORT + 0.25 * LONG)
    assert (stats["rollout/trained_tokens_mean"], stats["rollout/dropped_tokens_mean"]) == (
        SHORT,
        LONG,
    )
    assert (stats["rollout/trained_fraction"], stats["rollout/longest_tenth_trained_fraction"]) == (
        0.75,
        0.0,
    )


def test_rare_starved_long_answers_are_detected() -> None:
    """8 % of the samples are half as long again as the others; the mean falls by only 4 %."""
    lengths = np.random.default_rng(0).integers(90, 110, 100)
    groups = [
        dropped(n, "stale", 150) if n % 12 == 10 else trained(n, int(lengths[n]))
        for n in range(100)
    ]
    said, meter = played([fact for group in groups for fact in group])
    stats = meter.step()
    assert stats["rollout/trained_tokens_mean"] > 0.9 * stats["rollout/sampled_tokens_mean"]
    assert len(said) == 1


def test_unreturned_answers_count_with_their_partial_tokens() -> None:
    groups: list[list[JournalEvent]] = []
    for n in range(100):
        lost: list[JournalEvent] = [
            PartialSaved(n, 0, Partial(*arrays(LONG))),
            GroupDropped(n, "generation_failed"),
        ]
        groups.append(trained(n, SHORT, SHORT) if n % 2 else lost)
    [warning], _ = played([fact for group in groups for fact in group])
    assert "dropped as generation_failed: raise rollout.lease_timeout_s" in warning


@pytest.mark.parametrize("reason", ["stale", "equal_rewards"])
def test_drops_of_all_lengths_are_not_starvation(reason: str) -> None:
    groups = [
        dropped(n, reason, SHORT, LONG) if n % 5 in (0, 1) else trained(n, SHORT, LONG)
        for n in range(200)
    ]
    assert played([fact for group in groups for fact in group])[0] == []


def test_trained_long_answers_are_not_starvation() -> None:
    groups = [
        trained(n, SHORT, LONG) if n % 2 else dropped(n, "equal_rewards", SHORT) for n in range(100)
    ]
    assert played([fact for group in groups for fact in group])[0] == []


def test_few_groups_and_end_of_run_give_no_warning() -> None:
    groups = [trained(n, SHORT) for n in range(MIN_GROUPS - 1)] + [
        dropped(90 + n, "stale", LONG) for n in range(9)
    ]
    assert played([fact for group in groups for fact in group])[0] == []
    groups = [trained(n, SHORT) for n in range(50)] + [
        dropped(90 + n, "run_ended", LONG) for n in range(40)
    ]
    assert played([fact for group in groups for fact in group])[0] == []


def test_warning_repeats_while_it_lasts_but_not_every_step() -> None:
    starved = [trained(n, SHORT) if n % 2 else dropped(n, "stale", LONG) for n in range(4 * WINDOW)]
    fair = [trained(10_000 + n, LONG) for n in range(4 * WINDOW)]
    assert len(played([fact for group in starved for fact in group])[0]) == 4
    # the window has to be refilled
    assert len(played([fact for group in starved + fair for fact in group])[0]) <= 5


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_random_drops_give_no_warning(share: float) -> None:
    warnings = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        events: list[JournalEvent] = []
        for n in range(300):
            lengths = [int(length) for length in draw.lognormal(5, 0.8, 2)]
            events += (
                trained(n, *lengths) if draw.random() < share else dropped(n, "stale", *lengths)
            )
        warnings += bool(played(events, ask_every=24)[0])  # a step of eight groups
    assert warnings <= 1
