"""The exact tokens of an episode: a tree of requests, of which each leaf is a training sequence.

A request is text: the chat template's rendering of its messages. If the text begins with the whole
text of an earlier turn (its prompt and the sampled text), the request continues that turn: its ids
are the turn's ids, as sampled, and then those of the new text. Sampled text is never tokenized
again. A request that begins otherwise, as after a compaction of the history, by a sub-agent or as a
retry, starts a branch.

Turns are numbered from 0 in the order of their ends; the agent may give each a reward, posted
during the episode or returned. Of several for one turn the last counts.

Each leaf is trained as one sequence. The turns that several leaves share are trained in the first
of them and are context in the others.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from megatron_async_rl.errors import DataError, HookFailed
from megatron_async_rl.protocol.types import (
    MAX_REWARD,
    TURN_BREAK,
    Sample,
    Segment,
    StopReason,
    generated_runs,
    token_arrays,
)
from megatron_async_rl.rollout.agents.apis.fields import Fields
from megatron_async_rl.rollout.agents.apis.request import RequestError
from megatron_async_rl.rollout.workflow import Completion


@dataclass
class Turn:
    """A finished request. `ids` are those of its prompt and then the sampled ones."""

    text: str
    ids: list[int]
    completion: Completion
    parent: Turn | None
    num_children: int = 0
    raw: str = ""  # the sampled text, without the token that ended it
    number: int = field(default=0)  # in the order of their ends

    @property
    def num_prompt(self) -> int:
        return len(self.ids) - len(self.completion.ids)


class Transcript:
    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def continued(self, text: str) -> Turn | None:
        """Returns the longest turn of which the whole text begins `text`."""
        matches = [turn for turn in self.turns if text.startswith(turn.text)]
        return max(matches, key=lambda turn: len(turn.text), default=None)

    def nearest(self, text: str) -> tuple[Turn, int] | None:
        """Returns the turn that begins with the most characters of `text`, and their number."""
        shared = [(turn, _num_common(turn.text, text)) for turn in self.turns]
        return max(shared, key=lambda found: found[1], default=None)

    def add(self, turn: Turn) -> None:
        turn.number = len(self.turns)
        self.turns.append(turn)
        if turn.parent:
            turn.parent.num_children += 1

    @property
    def num_sequences(self) -> int:
        return sum(not turn.num_children for turn in self.turns)

    def sample(self, stop: StopReason, rewards: Mapping[int, float]) -> Sample:
        """Returns the episode as one sample of several sequences. Raises DataError without turns.

        The text is that of all turns in order. `rewards`: of turns, by number; without any the
        reward function scores the text.
        """
        if not self.turns:
            raise DataError(
                "the agent made no request that was answered: nothing was sampled",
                "have it use the address and key that it is given",
            )
        starts: dict[int, int] = {}
        sequences, edges = [], [0]
        for turn in self.turns:
            if not turn.num_children:
                sequences.append(_sequence(turn, starts, edges[-1]))
                edges.append(edges[-1] + len(turn.ids))
        ids, logprobs, versions = (
            np.concatenate(arrays) for arrays in zip(*sequences, strict=True)
        )
        turn_starts = [starts[turn.number] for turn in self.turns]
        in_order = turn_starts == [start for start, _ in generated_runs(versions)]
        *before, final = [rewards.get(turn.number, 0.0) for turn in self.turns]
        return Sample(
            ids=ids,
            logprobs=logprobs,
            versions=versions,
            stop=stop,
            text=TURN_BREAK.join(turn.raw for turn in self.turns),
            num_interrupts=sum(max(0, len(t.completion.segments) - 1) for t in self.turns),
            starts=edges[:-1] if len(sequences) > 1 else [],
            reward=final if rewards else None,
            turn_rewards=[*before, 0.0] if any(before) else [],
            turn_starts=[] if in_order else turn_starts,
            text_ends=self._text_ends() if before else [],
        )

    def _text_ends(self) -> list[int]:
        lengths = [len(turn.raw) + len(TURN_BREAK) for turn in self.turns]
        return [end - len(TURN_BREAK) for end in itertools.accumulate(lengths)]


def _sequence(
    leaf: Turn, starts: dict[int, int], offset: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, logprobs and versions of the path to a leaf, which begins at `offset`.

    Turns that are in `starts` are context; those that are trained here are added, by number, with
    the place of their first token.
    """
    trained: list[tuple[int, list[Segment]]] = []
    turn: Turn | None = leaf
    while turn:
        if turn.number not in starts:
            starts[turn.number] = offset + turn.num_prompt
            trained.append((turn.num_prompt, turn.completion.segments))
        turn = turn.parent
    return token_arrays(leaf.ids, trained)


def _num_common(a: str, b: str) -> int:
    """Returns the number of leading characters in common, by bisection."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda length: a[:length] != b[:length])


# ---- the rewards that the agent gives

Reward = Annotated[float, msgspec.Meta(ge=-MAX_REWARD, le=MAX_REWARD)]
Returned = Reward | list[Reward] | dict[Annotated[int, msgspec.Meta(ge=0)], Reward] | None
"""The reward of the last turn, of every turn, of some turns by number, or none."""


class TurnRewards(dict[int, float]):
    """Rewards by the number of the turn; empty if the agent gave none."""

    def post(self, body: dict[str, Any], num_turns: int) -> dict[str, Any]:
        """Takes the body of /v1/reward; returns the answer. Raises RequestError."""
        reward: Any = body.get("reward")
        turn = Fields(body).integer("turn", num_turns - 1)
        if type(reward) not in (int, float):
            raise RequestError(400, "reward must be a number")
        if not abs(reward) <= MAX_REWARD:  # or NaN
            raise RequestError(400, f"reward = {reward}, must be finite and at most {MAX_REWARD:g}")
        if not num_turns:
            raise RequestError(400, "no request was answered yet, so there is no turn to reward")
        assert turn is not None
        if not 0 <= turn < num_turns:
            raise RequestError(400, f"turn = {turn}, must be 0 to {num_turns - 1}")
        self[turn] = float(reward)
        return {"reward": self[turn], "turn": turn}

    def give(self, returned: Returned, num_turns: int) -> None:
        """Takes the result of the agent. Raises HookFailed if it does not fit the turns."""
        if isinstance(returned, list):
            if len(returned) != num_turns:
                raise HookFailed(
                    f"the agent returned {len(returned)} rewards for an episode of {num_turns} "
                    "turns",
                    "return one for each answer of the policy, a number, or {turn: reward}",
                )
            self.update(enumerate(returned))
        elif isinstance(returned, dict):
            if wrong := [turn for turn in returned if turn >= num_turns]:
                raise HookFailed(
                    f"the agent returned a reward for turn {wrong[0]} of an episode of {num_turns} "
                    "turns",
                    "turns are numbered from 0",
                )
            self.update(returned)
        elif returned is not None and num_turns:
            self[num_turns - 1] = returned


def checked_rewards(value: Any, where: str) -> Returned:
    """Returns the result of an agent, given as JSON. Raises HookFailed if it is not rewards."""
    try:
        rewards: Returned = msgspec.convert(value, Returned, str_keys=True)
    except msgspec.ValidationError:
        raise HookFailed(
            f"{where} {value!r}; must be a finite number, a list of one per turn, a mapping "
            "{turn: number}, or None for no reward"
        ) from None
    return rewards
