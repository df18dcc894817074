"""A workflow of three turns for whole runs; a module that a run's configuration names."""

from __future__ import annotations

import asyncio

from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Episode, Policy

GIVEN = "no, 1+1="
TURN_TOKENS = 32
NUM_TURNS = 3
CONTEXT_TOKENS = 128  # model.context_tokens of whole_runs.py
UPDATE_S = 120.0


def is_bad(prompt: Prompt) -> bool:
    return int(prompt.ids.sum()) % 3 == 0


async def wait_for_update(policy: Policy, ids: list[int], version: int) -> None:
    """Generates until the server has other weights than those of `version`, at most UPDATE_S."""
    sampling = Sampling(TURN_TOKENS, 1.0, [])
    async with asyncio.timeout(UPDATE_S):
        while (await policy.generate(ids, sampling)).segments[-1].version == version:
            pass


class ThreeTurns:
    """Scores and rewards each turn, adds given tokens between turns; every third prompt ends badly.

    The first sample of a worker waits after its first turn for a weight update, so that one falls
    within a sample on every machine.
    """

    _one_waits = False

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        waits = not (self._one_waits or is_bad(prompt))
        self._one_waits = self._one_waits or waits
        episode, texts = Episode(prompt.ids), []
        given = policy.tokenizer.encode(GIVEN).tolist()
        for number in range(NUM_TURNS):
            if number:
                episode.add_context(given)
            turn = await policy.generate(
                episode.ids, Sampling(TURN_TOKENS, sampling.temperature, sampling.stop_token_ids)
            )
            text = policy.tokenizer.decode(turn.ids)
            score = await policy.score(text)
            texts.append(f"{text} => {score}")
            episode.add_turn(turn, score)
            if waits and not number:
                await wait_for_update(policy, episode.ids, turn.segments[-1].version)
        if is_bad(prompt):  # a faulty workflow: more tokens than model.context_tokens
            episode.add_context(given * CONTEXT_TOKENS)
            episode.add_turn(await policy.generate(episode.ids, sampling))
        return episode.sample(turn.stop, "\n".join(texts))


class Broken:
    """Fails on every sample."""

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        raise ValueError("no tool in the row")
