"""Checks the tokens of samples and partial samples before they are recorded.

Called by core/leases.py for each reply, and by core/core.py for partial samples of a restored
journal. Tokens that pass cannot make the controller or the trainer fail, nor break the staleness
bound.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.protocol.types import (
    MAX_REWARD,
    NOT_GENERATED,
    TURN_BREAK,
    Partial,
    Prompt,
    Sample,
    generated_runs,
)

MAX_LOGPROB = 0.01  # 0, and room for rounding in the engine
_DTYPES = {"ids": np.int32, "logprobs": np.float32, "versions": np.int32}


def token_fault(
    tokens: Sample | Partial, prompt: Prompt, oldest: int, newest: int, settings: CoreSettings
) -> str:
    """Returns why the tokens cannot be of a server of this run; empty if they can.

    Versions must be from `oldest` to `newest`. The tokens of a single turn are the prompt and then
    the response. Other workflows choose the context, but in a partial sample it comes first.
    """
    ids, logprobs, versions = tokens.ids, tokens.logprobs, tokens.versions
    if not len(ids) == len(logprobs) == len(versions) > 0:
        return f"{len(ids)} ids, {len(logprobs)} logprobs, {len(versions)} versions"
    if fault := _length_fault(tokens, settings):
        return fault
    for name, dtype in _DTYPES.items():
        if getattr(tokens, name).dtype != dtype:
            return f"{name} are {getattr(tokens, name).dtype}"
    if ids.min() < 0 or ids.max() >= settings.vocab_size:
        return f"ids {ids.min()} to {ids.max()}, the vocabulary has {settings.vocab_size}"
    return _version_fault(tokens, oldest, newest) or (
        _context_fault(tokens, prompt, settings.single_turn)
        or ("" if math.isfinite(logprobs.sum()) else "logprobs that are not finite")
        or ("" if logprobs.max() <= MAX_LOGPROB else f"a logprob of {logprobs.max():g}, above 0")
        or _reward_fault(tokens, settings)
        or _experts_fault(tokens, settings)
    )


def _length_fault(tokens: Sample | Partial, settings: CoreSettings) -> str:
    length = len(tokens.ids)
    if isinstance(tokens, Sample) and tokens.starts:
        edges, most = [*tokens.starts, length], settings.max_sequences
        if edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            return f"starts {tokens.starts[:3]}... in {length} tokens"
        if len(tokens.starts) > most:
            return f"{len(tokens.starts)} sequences, at most {most} can be"
        length = max(b - a for a, b in itertools.pairwise(edges))
    if length > settings.context_tokens:
        return f"{length} tokens, model.context_tokens = {settings.context_tokens}"
    return ""


def _reward_fault(tokens: Sample | Partial, settings: CoreSettings) -> str:
    """Checks the turns and their rewards; a single turn is scored by the reward function only."""
    if isinstance(tokens, Partial):
        return ""
    if tokens.reward is None and not (
        tokens.turn_rewards or tokens.turn_starts or tokens.text_ends
    ):
        return ""  # of most samples: their turns need not be found
    if settings.single_turn and (tokens.reward is not None or tokens.turn_rewards):
        return "a reward, but rollout.workflow = single_turn gives none"
    starts, runs = set(tokens.turn_starts), generated_runs(tokens.versions)
    if starts and not (
        len(starts) == len(tokens.turn_starts)
        and starts.issuperset(start for start, _ in runs)
        and starts.issubset(np.flatnonzero(tokens.generated).tolist())
    ):
        return f"turns at {tokens.turn_starts[:3]}..., which are not those of the generated tokens"
    num_turns, ends = len(starts) or len(runs), tokens.text_ends
    if ends and not (
        len(ends) == num_turns
        and ends[0] >= 0
        and ends[-1] == len(tokens.text)
        and all(a + len(TURN_BREAK) <= b for a, b in itertools.pairwise(ends))
    ):
        return f"texts that end at {ends[:3]}... for {num_turns} turns"
    if tokens.turn_rewards and len(tokens.turn_rewards) != num_turns:
        return f"{len(tokens.turn_rewards)} rewards for {num_turns} turns"
    rewards = [*tokens.turn_rewards, tokens.reward or 0.0]
    wrong = [r for r in (*rewards, sum(rewards)) if not abs(r) <= MAX_REWARD]
    return f"a reward of {wrong[0]:g}, the limit is {MAX_REWARD:g}" if wrong else ""


def _experts_fault(tokens: Sample | Partial, settings: CoreSettings) -> str:
    """Evaluations and samples begun without rollout.routing_replay have no experts."""
    experts, routing = tokens.experts, settings.routing
    if not len(experts):
        return ""
    if routing is None:
        return "experts, but rollout.routing_replay is not set"
    if experts.dtype != routing.dtype or len(experts) != len(tokens.ids) * routing.width:
        return (
            f"{len(experts)} experts of {experts.dtype}, not {routing.width} of "
            f"{routing.dtype} for each of {len(tokens.ids)} tokens"
        )
    highest = int(experts.max())
    return "" if highest < routing.num_experts else f"expert {highest} of {routing.num_experts}"


def _version_fault(tokens: Sample | Partial, oldest: int, newest: int) -> str:
    lowest, last = int(tokens.versions.min()), int(tokens.versions.max())
    if lowest < NOT_GENERATED:
        return f"a version of {lowest}"
    if last == NOT_GENERATED:
        return "no token was generated"
    if tokens.oldest_version < oldest or last > newest:
        return f"versions {tokens.oldest_version} to {last}, possible are {oldest} to {newest}"
    return ""


def _context_fault(tokens: Sample | Partial, prompt: Prompt, single_turn: bool) -> str:
    generated = tokens.versions != NOT_GENERATED
    num_context = int(generated.argmax())  # before the first generated token
    if (single_turn or isinstance(tokens, Partial)) and not generated[num_context:].all():
        return "context after generated tokens"
    if single_turn and not np.array_equal(tokens.ids[:num_context], prompt.ids):
        return f"it does not begin with prompt {prompt.prompt_id!r}"
    return ""
