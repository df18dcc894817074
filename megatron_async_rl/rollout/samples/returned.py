"""Checks the result of a workflow, so that a fault fails its sample and not the rollout worker.

The controller refuses a message that it cannot read, or with values out of range, and its sender
with it. Anything that a user's code has put into a sample is therefore checked before it is sent.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable
from typing import Any

import msgspec

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import DataError, ProtocolError
from megatron_async_rl.protocol import rules
from megatron_async_rl.protocol.messages import Generated
from megatron_async_rl.protocol.types import MAX_REWARD, Sample, SampleKey
from megatron_async_rl.protocol.user_metrics import MetricFilter
from megatron_async_rl.protocol.wire import Codec, Frame


class ReturnedSamples:
    def __init__(self, config: Config, logger: logging.Logger) -> None:
        self._context_tokens = config.model.context_tokens
        self._workflow = config.rollout.workflow
        self._metrics = MetricFilter(logger)
        # the controller reads no longer arrays (controller/__main__.py)
        self._codec = Codec(max_length=config.model.context_tokens * config.max_sequences)

    def encoded(
        self, key: SampleKey, returned: Any, complete: Callable[[Sample], Sample]
    ) -> list[Frame]:
        """Returns the frames of a message with the sample that `complete` makes of this one.

        Numbers become plain ones, and invalid metrics are dropped. Raises DataError if the result
        cannot be sent.
        """
        if not isinstance(returned, Sample):
            raise self._fault(f"a {type(returned).__name__}", "a Sample")
        longest = max(part.stop - part.start for part in returned.sequences())
        if longest > self._context_tokens:
            limit = f"a Sample of at most model.context_tokens = {self._context_tokens}"
            raise self._fault(f"{longest} tokens", limit)
        sample = msgspec.structs.replace(
            returned,
            discount=self._number("discount", returned.discount),
            reward=None if returned.reward is None else self._number("reward", returned.reward),
            turn_rewards=[self._number("reward", reward) for reward in returned.turn_rewards],
            metrics=self._metrics.valid(returned.metrics),
        )
        message = Generated(key, complete(sample))
        try:
            frames = self._codec.encode(message)
            self._codec.decode(frames)
        except ProtocolError as e:
            raise self._fault(f"a Sample that no message can carry ({e})", "plain data") from None
        if problem := rules.field_problem(message):
            raise self._fault(f"a Sample with {problem}", "within the range of that field")
        if not returned.num_generated:
            raise self._fault("a Sample without a generated token", "one with a token")
        return frames

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, numbers.Real) and abs(value) <= MAX_REWARD:  # type: ignore[operator]
            return float(value)
        found = f"a Sample with {name} = {rules.shown(value)}"
        raise self._fault(found, f"a number of at most {MAX_REWARD:g}")

    def _fault(self, found: str, expected: str) -> DataError:
        return DataError(
            f"rollout.workflow = {self._workflow} returned {found}, must be {expected}",
            "correct the workflow",
        )
