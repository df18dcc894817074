"""Prompts: the rows of the sources, tokenized and filtered by the settings.

The controller reads all of them at its start; preflight runs `check_source`, which tokenizes long
rows only.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import EvaluationSet, SourceConfig
from megatron_async_rl.data import chat_template, success_rate, thinking
from megatron_async_rl.data.order import SourcePrompts
from megatron_async_rl.data.sources import read_rows, training_sources
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.protocol.types import Prompt

logger = logging.getLogger(__name__)
Report = Callable[[str], None]
_MAX_TAG_TOKENS = 64  # of an opening tag at the end of a prompt


def read_training(
    config: Config, tokenizer: Tokenizer, report: Report = logger.warning
) -> list[SourcePrompts]:
    """Returns the prompts of all sources of data.train. Raises as `read_source`.

    With several sources the ids of a source's prompts begin with its number.
    """
    rates = success_rate.recorded(config)
    sources = training_sources(config)
    found = []
    for index, (setting, source) in enumerate(sources):
        prompts = read_source(source, setting, config, tokenizer, report)
        if config.data.filter.run:
            name = f"{setting} = {source.path}"
            prompts = success_rate.keep(prompts, rates, config.data.filter, name, report)
        if len(sources) > 1:
            prompts = [
                msgspec.structs.replace(prompt, prompt_id=f"{index}:{prompt.prompt_id}")
                for prompt in prompts
            ]
        found.append(SourcePrompts(prompts, source.weight))
    return found


def read_evaluation(
    config: Config, tokenizer: Tokenizer, report: Report = logger.warning
) -> dict[str, list[Prompt]]:
    """Returns the prompts of each evaluation set by its name. Raises as `read_source`."""
    found = {}
    for name, chosen in config.evaluation.sets.items():
        setting, limited = f"evaluation.sets.{name}.path", evaluation_config(config, chosen)
        found[name] = read_source(chosen, setting, limited, tokenizer, report)
    return found


def read_source(
    source: SourceConfig,
    setting: str,
    config: Config,
    tokenizer: Tokenizer,
    report: Report = logger.warning,
) -> list[Prompt]:
    """Reads and tokenizes a source; `setting` is its name in errors.

    Raises DataError as `read_rows`, and for prompts that are too long or have tokens outside the
    model's vocabulary. `report` is called with the number of prompts that the source's limits or
    data.overlong = drop leave out.
    """
    prompts = []
    for prompt_id, fields, ids in _read(source, setting, config, tokenizer, report):
        end = tokenizer.decode(ids[-_MAX_TAG_TOKENS:])
        opening_tag = thinking.opened_by(end, config.reward.thinking_tags)
        prompts.append(Prompt(prompt_id, ids, fields, opening_tag))
    return prompts


def check_source(
    source: SourceConfig,
    setting: str,
    config: Config,
    report: Report = logger.warning,
    tokenizes: bool = True,
) -> int:
    """Returns the number of rows, for preflight, which reads all of them.

    Raises ConfigError or DataError and reports as `read_source`, but tokenizes only the first text,
    the first chat, and rows that may be too long: a tokenizer makes at most one token of a byte. So
    it does not count the shorter ones that min_prompt_tokens leaves out. `tokenizes`: False reads
    the rows alone.
    """
    if not tokenizes:
        return sum(1 for _ in read_rows(source, setting, config))
    longest = min(_max_tokens(config), source.max_prompt_tokens or _max_tokens(config))
    kinds: Counter[bool] = Counter()  # of prompts: whether they are chats

    def is_tokenized(prompt: str | list[Any]) -> bool:
        is_chat = config.data.chat_template or isinstance(prompt, list)
        kinds[is_chat] += 1
        return kinds[is_chat] == 1 or len(str(prompt).encode(errors="replace")) > longest

    source = msgspec.structs.replace(source, min_prompt_tokens=1)
    for _ in _read(source, setting, config, Tokenizer(config.model.path), report, is_tokenized):
        pass
    return kinds.total()


def _read(
    source: SourceConfig,
    setting: str,
    config: Config,
    tokenizer: Tokenizer,
    report: Report,
    is_tokenized: Callable[[str | list[Any]], bool] = lambda prompt: True,
) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """Yields id, fields and tokens of the rows that are not left out; no tokens of some rows."""
    left_out: Counter[str] = Counter()
    num_left = 0
    vocab_size = HfConfig(config.model.path).vocab_size
    for place, prompt_id, fields in read_rows(source, setting, config):
        prompt, ids = _prompt(fields["prompt"], source), np.empty(0, np.int32)
        if is_tokenized(prompt):
            try:
                ids = _tokenize(prompt, config, tokenizer)
            except (ConfigError, DataError) as e:
                raise type(e)(f"{place}: {e.problem}", e.remedy) from None
            if reason := _left_out(len(ids), source, config):
                left_out[reason] += 1
                continue
            _check(ids, place, vocab_size, tokenizer, config)
        num_left += 1
        yield prompt_id, fields | {"prompt": prompt}, ids
    total = num_left + left_out.total()
    for reason, count in left_out.items():
        text = f"{count:,} of {total:,} prompts of {setting} = {source.path} {reason}"
        if not num_left:
            raise DataError(f"{text}: none is left", "change these settings, or the dataset")
        report(text)


def evaluation_config(config: Config, chosen: EvaluationSet) -> Config:
    """Returns the configuration with the response length of an evaluation set."""
    limit = chosen.max_new_tokens or config.rollout.max_new_tokens
    rollout = msgspec.structs.replace(config.rollout, max_new_tokens=limit)
    return msgspec.structs.replace(config, rollout=rollout)


def _max_tokens(config: Config) -> int:
    return config.model.context_tokens - config.rollout.max_new_tokens


def _check(
    ids: np.ndarray, place: str, vocab_size: int, tokenizer: Tokenizer, config: Config
) -> None:
    """Raises DataError for an empty prompt, one that leaves no room for a response, one that the
    tokenizer cannot write, and for tokens that the model does not have: a server would crash."""
    if not 0 < len(ids) <= _max_tokens(config):
        raise DataError(
            f"{place}: the prompt has {len(ids)} tokens, must be 1 to {_max_tokens(config)} "
            "(model.context_tokens - rollout.max_new_tokens)",
            "shorten it, change one of these settings, or set data.overlong=drop",
        )
    if ids.max(initial=0) >= vocab_size:
        raise DataError(
            f"{place}: token id {ids.max()} is outside the model's vocabulary of {vocab_size}",
            f"put the model's own tokenizer into model.path = {config.model.path}",
        )
    num_unknown = np.count_nonzero(ids == tokenizer.unk_id)
    if num_unknown > len(ids) / 2:
        raise DataError(
            f"{place}: the tokenizer in model.path = {config.model.path} knows only "
            f"{len(ids) - num_unknown} of the prompt's {len(ids)} tokens",
            "correct the row, or use another model: the quickstart's knows digits and signs only",
        )


def _left_out(num_tokens: int, source: SourceConfig, config: Config) -> str:
    """Returns why a prompt of this length is left out, "" if it is not."""
    if num_tokens < source.min_prompt_tokens:
        return f"have fewer tokens than min_prompt_tokens = {source.min_prompt_tokens}"
    if source.max_prompt_tokens is not None and num_tokens > source.max_prompt_tokens:
        return f"have more tokens than max_prompt_tokens = {source.max_prompt_tokens}"
    if num_tokens > (limit := _max_tokens(config)) and config.data.overlong == "drop":
        return (
            f"have more than {limit} tokens (model.context_tokens - rollout.max_new_tokens) "
            "and are dropped (data.overlong = drop)"
        )
    return ""


def _prompt(prompt: str | list[Any], source: SourceConfig) -> str | list[Any]:
    """Returns the prompt, as messages with the source's system message if it has one."""
    if source.system_prompt is None:
        return prompt
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    own = [m for m in messages if not (isinstance(m, dict) and m.get("role") == "system")]
    return [{"role": "system", "content": source.system_prompt}, *own]


def _tokenize(prompt: str | list[Any], config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Returns [num_tokens] int32 of a text or of chat messages."""
    if isinstance(prompt, list) or config.data.chat_template:
        return tokenizer.encode(_render(prompt, config, tokenizer))
    return tokenizer.encode(prompt, add_bos=config.data.add_bos)


def _render(prompt: str | list[Any], config: Config, tokenizer: Tokenizer) -> str:
    """Renders messages, or a text as one user message. Raises ConfigError without a template."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not tokenizer.templates:
        model = f"model.path = {config.model.path} has no chat template"
        if isinstance(prompt, list):
            raise ConfigError(
                f"{model}, and the prompt is a list of messages",
                "write the prompts as text without a system_prompt, or add chat_template.jinja to "
                "the model folder",
            )
        raise ConfigError(
            f"data.chat_template = true, but {model}",
            "set data.chat_template to false, or add chat_template.jinja to the model folder",
        )
    data = config.data
    variables = chat_template.template_variables(config)
    return tokenizer.render_chat(messages, data.chat_template_name, variables)
