"""The turns of a batch's samples with their rewards, as the estimators of advantages see them.

delivery.py makes them from the samples; advantage.py shapes their rewards and passes them on.

Suffixes: G groups of the batch, S samples of a group, K turns of one sample in the order of the
calls, N generated tokens of one sample in the order of its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_async_rl.protocol.types import Sample


@dataclass(frozen=True)
class Turns:
    """The turns of one sample."""

    rewards: np.ndarray  # [K] float64
    starts: np.ndarray  # [K] int64: first token in the sample's arrays
    lengths: np.ndarray  # [K] int64: generated tokens

    def per_token(self, values_K: np.ndarray) -> np.ndarray:
        """Returns the value of its turn for each generated token [N]."""
        order = np.argsort(self.starts)
        return np.repeat(values_K[order], self.lengths[order])


TurnsGS = list[list[Turns]]


def turns_of(sample: Sample, reward: float, turn_rewards: Sequence[float] = ()) -> Turns:
    """Returns the turns of a sample; without `turn_rewards` its reward is that of the last one."""
    starts, ends = np.asarray(sample.turns(), np.int64).T
    rewards = np.zeros(len(starts))
    rewards[-1] = reward
    if turn_rewards:
        rewards[:] = turn_rewards
    return Turns(rewards, starts, ends - starts)


def single_turns(rewards_GS: np.ndarray, tokens_GS: np.ndarray) -> TurnsGS:
    """Returns samples of one turn each, with these rewards and generated tokens."""
    return [
        [
            Turns(np.array([r]), np.zeros(1, np.int64), np.array([n]))
            for r, n in zip(*row, strict=True)
        ]
        for row in zip(rewards_GS, tokens_GS, strict=True)
    ]


def shaped_turns(turns_GS: TurnsGS, shaped_GS: np.ndarray, scale: float) -> TurnsGS:
    """Returns the turns with shaped rewards, which add up to the shaped reward of the sample.

    A turn's reward is multiplied by `scale`. The last turn gets the rest: offset, clipping and the
    overlong penalty are those of the whole sample.
    """

    def shaped(turns: Turns, reward: float) -> Turns:
        rewards_K = scale * turns.rewards
        rewards_K[-1] = reward - rewards_K[:-1].sum()
        return replace(turns, rewards=rewards_K)

    return [
        [shaped(turns, reward) for turns, reward in zip(*row, strict=True)]
        for row in zip(turns_GS, shaped_GS, strict=True)
    ]


def rewards_to_go(rewards_K: np.ndarray, gamma: float) -> np.ndarray:
    """Returns [K] float64: G_k = r_k + gamma G_{k+1}, the discounted rewards from turn k on."""
    returns_K = np.array(rewards_K, np.float64)
    for k in range(len(returns_K) - 2, -1, -1):
        returns_K[k] += gamma * returns_K[k + 1]
    return returns_K


def rewards_at_ends(sample: Sample, turns: Turns) -> np.ndarray:
    """Returns the rewards for a critic [N]: each at the last token of its turn, 0 elsewhere.

    The critic sees one sequence at a time. So a turn also has the rewards of the turns in other
    sequences that come after it and before the next turn of its own sequence, or the end.
    """
    rewards = np.zeros(len(sample.ids))
    starts = [part.start for part in sample.sequences()]
    sequence_K = np.searchsorted(starts, turns.starts, side="right")
    for sequence in np.unique(sequence_K):
        own = np.flatnonzero(sequence_K == sequence)
        sums = np.add.reduceat(turns.rewards, own)  # from each of them up to the next
        rewards[turns.starts[own] + turns.lengths[own] - 1] = sums
    return rewards[sample.generated]
