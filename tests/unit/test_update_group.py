"""A weight source stops waiting for servers that will not join its update group."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_async_rl.weights.update_group import UpdateGroup


@pytest.mark.parametrize("delay_s", [None, 0.2], ids=["before the join", "during the join"])
def test_join_ends_when_it_is_stopped(delay_s: float | None) -> None:
    """The run ends: the trainer must save long before the group's own deadline."""
    group = UpdateGroup("group", 2, "gloo", "127.0.0.1", timeout_s=30.0)
    if delay_s is None:
        group.stop("the run ends")
    else:
        threading.Timer(delay_s, group.stop, ["the run ends"]).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the run ends$"):
        group.join()
    assert time.monotonic() - started < 15.0
    group.close()
