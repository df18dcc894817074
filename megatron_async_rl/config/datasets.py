"""The `data` and `evaluation` sections of the configuration: datasets, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from megatron_async_rl.config.sections import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)


class SourceConfig(Section, frozen=True, kw_only=True):
    """One dataset."""

    path: Text
    """A file, or a folder: of files of one format, or saved by Hugging Face datasets."""
    format: Literal["auto", "jsonl", "json", "parquet", "arrow"] = "auto"
    """`auto` uses data.reader if it is set, else the suffix of the files."""
    split: str | None = None
    """In a folder with several splits, the one to read."""
    fields: dict[str, Text] = msgspec.field(default_factory=dict)
    """Column of each field, such as `{prompt: question, answer: reward_model.ground_truth}`;
    columns that are not named are left out. Empty keeps all columns under their own names."""
    system_prompt: str | None = None
    """System message of every prompt. It replaces a system message in the row."""
    min_prompt_tokens: PositiveInt = 1
    """Prompts of fewer tokens are left out."""
    max_prompt_tokens: PositiveInt | None = None
    """Prompts of more tokens are left out. Null leaves out none."""


class TrainingSource(SourceConfig, frozen=True, kw_only=True):
    """One source of training prompts."""

    weight: PositiveFloat = 1.0
    """Share of the prompts that come from this source, relative to the other sources."""


class DataFilterConfig(Section, frozen=True, kw_only=True):
    """Leaves out training prompts that an earlier run found too hard or too easy."""

    run: str | None = None
    """run.dir of the earlier run. A prompt's success rate is the mean reward of its samples there;
    prompts without samples are kept. Null filters nothing."""
    min: float = 0.0
    """Prompts with a lower success rate are left out."""
    max: float = 1.0
    """Prompts with a higher success rate are left out."""


class DataConfig(Section, frozen=True, kw_only=True):
    """The datasets, and how a prompt becomes tokens."""

    train: Text | Annotated[tuple[TrainingSource, ...], msgspec.Meta(min_length=1)]
    """Training prompts: the path of a dataset, or a list of sources. A row has `prompt`, and
    `answer` or `tests`."""
    reader: str | None = None
    """Reader of the sources: package.module:function, or `reasoning_gym` (docs/workflows.md).
    Null uses the built-in readers."""
    filter: DataFilterConfig = DataFilterConfig()
    chat_template: bool = False
    """Render a text `prompt` as a user message with the chat template of the model."""
    chat_template_name: str | None = None
    """Name of a template, for models with several. Null uses the one named `default`, or `tool_use`
    for prompts with tools."""
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    """Variables for the chat template, such as `enable_thinking: false`."""
    add_bos: bool | None = None
    """Put the BOS token before a prompt that uses no chat template. Null does as the model's
    tokenizer does."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """Prompts that leave no room for rollout.max_new_tokens in model.context_tokens: `refuse` ends
    the start and names the row, `drop` leaves them out and counts them."""


class EvaluationSet(SourceConfig, frozen=True, kw_only=True):
    """One evaluation set, by a name of your own: a dataset, and how its prompts are sampled."""

    samples: PositiveInt = 1
    """Number of samples of each prompt (k of avg@k)."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature. 0 is greedy decoding."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """As `rollout.top_p`, also while a trainer runs."""
    top_k: NonNegativeInt = 0
    """As `rollout.top_k`."""
    min_p: Fraction = 0.0
    """As `rollout.min_p`."""
    max_new_tokens: PositiveInt | None = None
    """Maximum number of response tokens. Null uses rollout.max_new_tokens."""


class EvaluationConfig(Section, frozen=True, kw_only=True):
    """Evaluations of the policy before, during and after training (docs/evaluation.md)."""

    sets: dict[str, EvaluationSet] = msgspec.field(default_factory=dict)
    """Evaluation sets by name. Without one nothing is evaluated."""
    before: bool = True
    """Evaluate the starting policy."""
    after: bool = True
    """Evaluate the last version."""
    every: NonNegativeInt = 0
    """Also evaluate every k-th version during training. 0 disables it."""
    mode: Literal["pause", "held_server", "mixed"] = "pause"
    """`pause` generates no training samples meanwhile. `held_server` keeps one of the servers at
    the version until its evaluation is complete, while training continues with the others. `mixed`
    evaluates on all servers with lower priority than training, over several versions."""
