"""The nouns that travel through the system: Prompt, Sample, Group, Batch share. numpy only, no torch.

A sample is flat arrays over prompt and response together. `versions[t]` is the weight version that sampled token t, or
NOT_GENERATED for a token that the policy did not sample (prompt, tool output): the loss is taken over the others, and
the staleness of a token is the trainer's version less its own.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec
import numpy as np

NOT_GENERATED = -1

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
    """One row of the dataset, ready to be generated from."""

    prompt_id: str
    ids: np.ndarray  # [num_prompt_tokens] int32
    row: dict[str, Any]  # the dataset row as read: what the reward and the workflow may look at


class Segment(msgspec.Struct, frozen=True):
    """A run of tokens sampled under one weight version."""

    version: int
    ids: list[int]
    logprobs: list[float]


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer: prompt and response tokens, with what the engine said of each."""

    ids: np.ndarray  # [num_tokens] int32
    logprobs: np.ndarray  # [num_tokens] float32, the behavior policy's; 0 where not generated
    versions: np.ndarray  # [num_tokens] int32, NOT_GENERATED where not generated
    stop: StopReason
    text: str  # the response as text, for the reward and for people
    num_interrupts: int = 0  # weight updates that came in the middle

    @property
    def generated(self) -> np.ndarray:
        """[num_tokens] bool: the tokens that are trained on."""
        return self.versions != NOT_GENERATED

    @property
    def num_generated(self) -> int:
        return int(np.count_nonzero(self.generated))

    def turns(self) -> list[list[int]]:
        """[[start, end], ...] of the runs of generated tokens: what the policy said between what it was given."""
        edges = np.flatnonzero(np.diff(self.generated, prepend=False, append=False)).tolist()
        return [list(turn) for turn in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def oldest_version(self) -> int:
        """Of the generated tokens, of which there is one at least."""
        return _oldest(self.versions)

    @property
    def newest_version(self) -> int:
        return int(self.versions.max())

    def version_runs(self) -> list[list[int]]:
        """[[version, tokens], ...] of the generated tokens in order: versions 3 3 - - 3 4 are [[3, 3], [4, 1]]."""
        cuts = (np.flatnonzero(self.versions[1:] != self.versions[:-1]) + 1).tolist()
        runs: list[list[int]] = []
        for start, end in itertools.pairwise([0, *cuts, len(self.versions)]):
            version = int(self.versions[start]) if start < end else NOT_GENERATED
            if version == NOT_GENERATED:
                continue
            if runs and runs[-1][0] == version:
                runs[-1][1] += end - start
            else:
                runs.append([version, end - start])
        return runs


class Partial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sample that was interrupted: the input of the policy's call that was under way, and what it gave so far."""

    ids: np.ndarray  # [num_tokens] int32
    logprobs: np.ndarray  # [num_tokens] float32
    versions: np.ndarray  # [num_tokens] int32, NOT_GENERATED for the input

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
        """The tokens after the input, by version."""
        start, end = self.num_input, len(self.ids)
        cuts = [start, *(np.flatnonzero(np.diff(self.versions[start:])) + start + 1).tolist(), end]
        return [
            Segment(int(self.versions[a]), self.ids[a:b].tolist(), self.logprobs[a:b].tolist())
            for a, b in itertools.pairwise(cuts)
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
    advantages: np.ndarray  # [num_tokens] float32; anything where not generated


def _oldest(versions: np.ndarray) -> int:
    """Without a copy of the generated ones: NOT_GENERATED is the largest number of all when read as unsigned."""
    return int(versions.view(np.uint32).min())


def join_segments(
    prompt_ids: np.ndarray, segments: list[Segment], stop: StopReason, text: str
) -> Sample:
    """The sample of a single turn: the prompt, then the segments in order."""
    num_prompt = len(prompt_ids)
    response = [token for segment in segments for token in segment.ids]
    logprobs = [logprob for segment in segments for logprob in segment.logprobs]
    versions = [segment.version for segment in segments for _ in segment.ids]
    return Sample(
        ids=np.concatenate([np.asarray(prompt_ids, np.int32), np.asarray(response, np.int32)]),
        logprobs=np.concatenate(
            [np.zeros(num_prompt, np.float32), np.asarray(logprobs, np.float32)]
        ),
        versions=np.concatenate(
            [np.full(num_prompt, NOT_GENERATED, np.int32), np.asarray(versions, np.int32)]
        ),
        stop=stop,
        text=text,
        num_interrupts=max(0, len(segments) - 1),
    )
