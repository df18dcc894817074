"""Names of a run's processes, and which of them another host may start."""

from __future__ import annotations

import pytest
from config_builders import config_tree

from megatron_async_rl.config import load
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.launcher import roles


def test_every_process_but_the_controller_can_join() -> None:
    config = load.from_tree(config_tree(rollout={"servers": 2, "max_new_tokens": 8}))
    assert roles.names(config) == ["controller", "rollout-0", "rollout-1", "trainer", "reward-0"]
    roles.check_joining(["rollout-0", "rollout-17", "reward-3", "trainer"], config)
    for name in ("controller", "rollout", "rollout-x", "trainer-0", ""):
        with pytest.raises(ConfigError, match="cannot be started apart from the controller"):
            roles.check_joining([name], config)
