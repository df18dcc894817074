"""Every state of a small setting with two faults; tests/unit has the search with one fault."""

from __future__ import annotations

import pytest
from state_search import search


@pytest.mark.slow
def test_every_state_with_two_faults_keeps_the_guarantees() -> None:
    states, transitions = search(num_faults=2)
    print(f"{states:,} states, {transitions:,} transitions")
    assert states >= 40_000
