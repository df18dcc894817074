"""The data that messages carry: prompts, samples, partial samples. Needs numpy, no torch.

A sample is flat arrays over prompt and response together. `versions[t]` is the weight version that
sampled token t, or NOT_GENERATED for a token that the policy did not sample (prompt, tool output).
The loss covers the generated tokens; a token's staleness is the trainer's version less its own.

A turn is one call of the policy: a run of generated tokens, or a part of one if no context lies
between two calls. The turns of a sample are numbered from 0 in the order of the calls, which agents
with several sequences may mix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

NOT_GENERATED = -1
MAX_REWARD = 1e9  # of either sign; a larger one, or NaN, is invalid
TURN_BREAK = "\n\n"  # between the texts of the turns in Sample.text
PROBE_TOKENS = 256  # at most, of each sample of a mismatch probe
NO_EXPERTS = np.empty(0, np.uint8)

StopReason = Literal["stop", "length"]
Purpose = Literal["train", "eval"]


class SampleKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sample under one lease. Replies with an older epoch or attempt are fenced."""

    epoch: int
    group_id: int
    attempt: int
    index: int  # of the sample in its group

    def __str__(self) -> str:
        return f"{self.group_id}.{self.index}"


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the dataset, tokenized."""

    prompt_id: str
    ids: np.ndarray  # [num_prompt_tokens] int32
    row: dict[str, Any]  # as read from the dataset, for reward function and workflow
    opening_tag: str = ""  # the one of reward.thinking_tags that the prompt's text ends in


class Segment(msgspec.Struct, frozen=True):
    """Consecutive tokens that were sampled under one weight version."""

    version: int
    ids: list[int]
    logprobs: list[float]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prompt and response tokens, with the engine's logprob and version of each."""

    ids: np.ndarray  # [num_tokens] int32
    logprobs: np.ndarray  # [num_tokens] float32, the behavior policy's; 0 where not generated
    versions: np.ndarray  # [num_tokens] int32, NOT_GENERATED where not generated
    stop: StopReason
    text: str  # the response
    num_interrupts: int = 0  # weight updates during generation
    discount: float = 1.0  # 0 to 1; the reward in training is the score of `text` times this
    starts: list[int] = []  # of the training sequences in the arrays, 0 first; empty: one sequence
    reward: float | None = None  # of the last turn; None: the reward function scores `text`
    turn_rewards: list[float] = []  # one per turn, beside `reward`; empty: all are 0
    turn_starts: list[int] = []  # first token of each turn; empty: of each run of generated tokens
    text_ends: list[
        int
    ] = []  # of the turns in `text`, see turn_texts; empty: `text` is not divided
    metrics: dict[str, float] = {}  # of the workflow, by name; their means are user/NAME
    experts: np.ndarray = NO_EXPERTS
    """[num_tokens * layers * top_k] uint8 or uint16, see model/routing.py; empty: not recorded."""

    @property
    def generated(self) -> np.ndarray:
        """[num_tokens] bool: the tokens that are trained."""
        return self.versions != NOT_GENERATED

    @property
    def num_generated(self) -> int:
        return int(np.count_nonzero(self.generated))

    def sequences(self) -> list[slice]:
        """Returns the places of the training sequences in the arrays; one, except with agents."""
        edges = [*(self.starts or [0]), len(self.ids)]
        return [slice(start, end) for start, end in itertools.pairwise(edges)]

    def turns(self) -> list[list[int]]:
        """Returns [[start, end], ...] of the tokens of each turn, in the order of the calls."""
        runs = generated_runs(self.versions)
        if not self.turn_starts:
            return runs
        next_cut = dict(itertools.pairwise(sorted({*self.turn_starts, *(end for _, end in runs)})))
        return [[start, next_cut[start]] for start in self.turn_starts]

    @property
    def oldest_version(self) -> int:
        """Oldest version of the generated tokens; needs at least one."""
        return _oldest(self.versions)

    @property
    def newest_version(self) -> int:
        return int(self.versions.max())

    def version_runs(self) -> list[list[int]]:
        """Returns [[version, tokens], ...] of the generated tokens in order.

        Versions 3 3 - - 3 4 give [[3, 3], [4, 1]].
        """
        edges = (np.flatnonzero(self.versions[1:] != self.versions[:-1]) + 1).tolist()
        runs: list[list[int]] = []
        for start, end in itertools.pairwise([0, *edges, len(self.versions)]):
            version = int(self.versions[start]) if start < end else NOT_GENERATED
            if version == NOT_GENERATED:
                continue
            if runs and runs[-1][0] == version:
                runs[-1][1] += end - start
            else:
                runs.append([version, end - start])
        return runs


class Partial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An interrupted sample: input of the policy's current call, and its tokens so far."""

    ids: np.ndarray  # [num_tokens] int32
    logprobs: np.ndarray  # [num_tokens] float32
    versions: np.ndarray  # [num_tokens] int32, NOT_GENERATED for the input
    experts: np.ndarray = NO_EXPERTS  # as of a Sample

    @property
    def num_input(self) -> int:
        return int(np.count_nonzero(self.versions == NOT_GENERATED))

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_input

    @property
    def oldest_version(self) -> int:
        return _oldest(self.versions)

    def segments(self) -> list[Segment]:
        """Returns the generated tokens by version."""
        start, end = self.num_input, len(self.ids)
        edges = [start, *(np.flatnonzero(np.diff(self.versions[start:])) + start + 1).tolist(), end]
        return [
            Segment(int(self.versions[a]), self.ids[a:b].tolist(), self.logprobs[a:b].tolist())
            for a, b in itertools.pairwise(edges)
            if a < b
        ]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file that a weight source wrote into a snapshot."""

    name: str
    num_bytes: int
    sha256: str
    tensors: list[str]


class TrainSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sample as the trainer sees it."""

    ids: np.ndarray  # [num_tokens] int32
    logprobs: np.ndarray  # [num_tokens] float32, behavior logprob of token t given tokens < t
    versions: np.ndarray  # [num_tokens] int32
    advantages: np.ndarray  # [num_tokens] float32; undefined where not generated
    probe_index: int = -1  # number of the sample in the step's mismatch probe; -1: not part of it
    probe_start: int = 0  # first of its PROBE_TOKENS tokens that the probe compares
    experts: np.ndarray = NO_EXPERTS  # as of a Sample

    def probe_slots(self) -> np.ndarray:
        """Returns [num_tokens] int32: 1 + the place of a token in the probe; 0: not part of it."""
        slots = np.zeros(len(self.ids), np.int32)
        if self.probe_index >= 0:
            tokens = slots[self.probe_start : self.probe_start + PROBE_TOKENS]
            tokens[:] = np.arange(len(tokens)) + self.probe_index * PROBE_TOKENS + 1
        return slots


def generated_runs(versions: np.ndarray) -> list[list[int]]:
    """Returns [[start, end], ...] of the runs of generated tokens."""
    generated = versions != NOT_GENERATED
    edges = np.flatnonzero(np.diff(generated, prepend=False, append=False)).tolist()
    return [list(run) for run in zip(edges[::2], edges[1::2], strict=True)]


def turn_texts(text: str, ends: list[int]) -> list[str]:
    """Returns the texts of the turns that `text` joins by TURN_BREAK; `ends`: Sample.text_ends."""
    starts = [0, *(end + len(TURN_BREAK) for end in ends)]
    return [text[a:b] for a, b in zip(starts, ends or [len(text)], strict=False)]


def _oldest(versions: np.ndarray) -> int:
    """Reads versions as unsigned, where NOT_GENERATED is the largest: no masked copy is needed."""
    return int(versions.view(np.uint32).min())


def join_segments(
    prompt_ids: np.ndarray, segments: list[Segment], stop: StopReason, text: str
) -> Sample:
    """Returns the sample of a single turn: the prompt, then the segments in order."""
    ids = np.asarray([token for segment in segments for token in segment.ids], np.int32)
    tokens = np.concatenate([np.asarray(prompt_ids, np.int32), ids])
    arrays = token_arrays(tokens, [(len(prompt_ids), segments)])
    return Sample(*arrays, stop, text, num_interrupts=max(0, len(segments) - 1))


def token_arrays(
    ids: Sequence[int] | np.ndarray, turns: Iterable[tuple[int, list[Segment]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, logprobs and versions of a sequence, as in a Sample.

    `turns`: the place of the first token, and the segments, of each turn that is trained.
    """
    logprobs = np.zeros(len(ids), np.float32)
    versions = np.full(len(ids), NOT_GENERATED, np.int32)
    for place, segments in turns:
        for segment in segments:
            end = place + len(segment.ids)
            logprobs[place:end] = segment.logprobs
            versions[place:end] = segment.version
            place = end
    return np.asarray(ids, np.int32), logprobs, versions
