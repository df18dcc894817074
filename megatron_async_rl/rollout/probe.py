"""The engine's part of the mismatch probe: logprobs of given tokens, by one prefill each.

controller/monitoring/mismatch.py chooses the tokens and compares with the trainer's logprobs.
"""

from __future__ import annotations

import logging

import numpy as np

from megatron_async_rl.errors import EngineError
from megatron_async_rl.protocol.messages import ProbeRequest, ProbeResult
from megatron_async_rl.protocol.types import PROBE_TOKENS
from megatron_async_rl.rollout.engine_client import EngineClient
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.weight_update import WeightUpdates

logger = logging.getLogger(__name__)


async def score_windows(
    request: ProbeRequest, client: EngineClient, gate: Gate, updates: WeightUpdates
) -> ProbeResult | None:
    """Returns the logprobs of all windows; None if the server has other weights, or fails.

    The windows are scored one after another, so that the server holds the logits of one at a time.
    """
    logprobs = np.full(len(request.windows) * PROBE_TOKENS, np.nan, np.float32)
    for index, window in enumerate(request.windows):
        if not gate.is_open or updates.version != request.version:
            return None
        try:
            async with gate.request():
                version, values = await client.input_logprobs(
                    window.ids.tolist(), window.start, updates.cache_key()
                )
        except EngineError as e:  # the probe is an observation: the run continues without it
            logger.warning("the mismatch probe of version %d failed: %s", request.version, e)
            return None
        if version != request.version:
            return None
        start = index * PROBE_TOKENS
        logprobs[start : start + len(values)] = values
    return ProbeResult(request.version, logprobs)
