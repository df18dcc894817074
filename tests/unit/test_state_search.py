"""Every state of a small setting with one fault; tests/system has the search with two faults."""

from __future__ import annotations

import pytest
from state_search import search

from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import AnyEvent, SampleReturned
from megatron_async_rl.errors import LedgerError


def test_every_state_with_one_fault_keeps_the_guarantees() -> None:
    states, transitions = search(num_faults=1)
    print(f"{states:,} states, {transitions:,} transitions")
    assert states >= 1_800


def test_search_finds_a_seeded_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ControllerState._apply

    def forgetful(self: ControllerState, event: AnyEvent) -> None:
        apply(self, event)
        if isinstance(event, SampleReturned):
            self.forget(self.groups[event.group_id])

    monkeypatch.setattr(ControllerState, "_apply", forgetful)
    with pytest.raises(LedgerError, match="a group was lost"):
        search(num_faults=2)
