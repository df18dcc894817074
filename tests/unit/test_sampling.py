"""Sampling settings, and where a response with a stop text ends."""

from __future__ import annotations

from typing import Any

import pytest
from config_builders import config_tree

from megatron_async_rl.cli.offline import replay
from megatron_async_rl.config import load
from megatron_async_rl.errors import ConfigError
from megatron_async_rl.rollout.generation import num_tokens_to_stop

TRUNCATIONS = [("rollout.top_p", 0.9), ("rollout.top_k", 20), ("rollout.min_p", 0.05)]
PIECES = ["a", "b", "ab", "<stop>", "c" * 7]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[token] for token in ids)


@pytest.mark.parametrize(("setting", "value"), TRUNCATIONS)
def test_training_refuses_truncated_sampling(setting: str, value: float) -> None:
    with pytest.raises(ConfigError) as refused:
        load.from_tree(config_tree(**{setting: value}))
    text = str(refused.value)
    assert text.startswith(f"{setting} = {value:g} removes tokens") and "\n" not in text
    assert f"set {setting}={1 if setting.endswith('top_p') else 0}" in text


@pytest.mark.parametrize(("setting", "value"), TRUNCATIONS)
def test_batches_of_truncated_sampling_are_not_replayed(
    setting: str, value: float, tmp_path: Any
) -> None:
    config = load.from_tree(config_tree(**{setting: value, "run.mode": "rollout_only"}))
    (tmp_path / "config.yaml").write_text(load.dump(config))
    with pytest.raises(ConfigError, match="removes tokens"):
        replay([tmp_path / "batches" / "0.npz"], None, [])


@pytest.mark.parametrize(
    ("ids", "num_new", "stop", "kept"),
    [
        ([0, 1, 0, 1], 4, ["ba"], 3),
        ([0, 1, 0, 1], 1, ["bab"], 4),  # it began before the new token
        ([0, 4, 2, 0], 4, ["ca"], 3),  # in the middle of a token
        ([0, 3, 0], 3, ["zz", "stop"], 2),
        ([0, 1, 0], 3, ["bb"], None),
        ([0, 1, 0], 0, ["b"], None),
        ([0, 1, 0], 3, [], None),
        ([3] * 50 + [0, 1], 2, ["ab"], 52),
    ],
)
def test_response_ends_with_the_token_that_completes_a_stop_text(
    ids: list[int], num_new: int, stop: list[str], kept: int | None
) -> None:
    assert num_tokens_to_stop(ids, num_new, stop, decode) == kept
