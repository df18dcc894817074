"""Datasets: JSONL files of prompts, read, checked and put in a seeded order.

`read_rows` is the one reader. Preflight runs it before a run starts; the controller runs it
through `read_prompts`, which also tokenizes. Rows are numbered from 1, as editors number lines.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.data import math_rows
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model.config_json import HfConfig
from megatron_async_rl.protocol.types import Prompt
from megatron_async_rl.storage import files

logger = logging.getLogger(__name__)
DIGESTS_FILE = "dataset.json"  # in run.dir


class Row(NamedTuple):
    number: int
    prompt_id: str
    fields: dict[str, Any]


class PromptStream:
    """Prompts in an order that depends on seed and epoch alone, epoch after epoch.

    A stream that starts at `start` continues exactly where the first `start` prompts of an earlier
    run ended.
    """

    def __init__(self, prompts: list[Prompt], seed: int, start: int = 0) -> None:
        self._prompts = prompts
        self._seed = seed
        self._epoch = -1
        self.position = start  # prompts returned so far, over all epochs

    def next(self) -> Prompt:
        epoch, offset = divmod(self.position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            rng = np.random.default_rng([self._seed, epoch])
            self._order = rng.permutation(len(self._prompts))
        self.position += 1
        return self._prompts[self._order[offset]]


def read_rows(path: str, setting: str, reward_function: str) -> Iterator[Row]:
    """Yields the rows of a dataset. `setting`: its key, such as data.train, for error messages.

    Raises DataError with the file, the row and the problem at the first row that cannot be used.
    """
    tests = reward_function == "code"
    expected = '"tests": [{"input": "1 1", "output": "2"}]' if tests else '"answer": "2"'
    form = f'a row is one line like {{"prompt": "1+1=", {expected}}}'
    seen: set[str] = set()
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    fields = _parse(line, reward_function)
                    named = fields.get("id")
                    prompt_id = str(number if named is None else named)
                    if prompt_id in seen:
                        raise DataError(f"duplicate id {prompt_id!r}")
                except DataError as e:
                    problem = f"{setting} = {path}, row {number}: {e}"
                    raise DataError(problem, f"correct the row: {form}") from None
                seen.add(prompt_id)
                yield Row(number, prompt_id, fields)
    except OSError as e:
        problem = f"{setting} = {path} cannot be read: {e.strerror}"
        raise DataError(problem, f"set {setting} to a JSONL file; {form}") from None
    if not seen:
        problem = f"{setting} = {path} has no rows"
        raise DataError(problem, f"set {setting} to another JSONL file; {form}")


def read_prompts(
    path: str,
    setting: str,
    config: Config,
    tokenizer: Tokenizer,
    report: Callable[[str], None] = logger.warning,
) -> list[Prompt]:
    """Reads and tokenizes a whole dataset. Raises DataError as `read_rows`, and for prompts that
    are too long or have tokens outside the model's vocabulary.

    With data.overlong = drop prompts that are too long are left out, and `report` is called with
    their number.
    """
    prompts: list[Prompt] = []
    num_overlong = 0
    vocab_size = HfConfig(config.model.path).vocab_size
    max_tokens = config.model.context_tokens - config.rollout.max_new_tokens
    for number, prompt_id, fields in read_rows(path, setting, config.reward.function):
        row = f"{setting} = {path}, row {number}"
        try:
            ids = _prompt_ids(fields["prompt"], config, tokenizer)
        except (ConfigError, DataError) as e:
            raise type(e)(f"{row}: {e.problem}", e.remedy) from None
        if len(ids) > max_tokens and config.data.overlong == "drop":
            num_overlong += 1
            continue
        if not 0 < len(ids) <= max_tokens:
            raise DataError(
                f"{row}: the prompt has {len(ids)} tokens, must be 1 to {max_tokens} "
                "(model.context_tokens - rollout.max_new_tokens)",
                "shorten it, change one of these settings, or set data.overlong=drop",
            )
        if ids.max() >= vocab_size:  # a server that receives it would crash
            raise DataError(
                f"{row}: token id {ids.max()} is outside the model's vocabulary of {vocab_size}",
                f"put the model's own tokenizer into model.path = {config.model.path}",
            )
        prompts.append(Prompt(prompt_id=prompt_id, ids=ids, row=fields))
    if num_overlong:
        dropped = (
            f"{num_overlong:,} of {len(prompts) + num_overlong:,} prompts of {setting} = {path} "
            f"have more than {max_tokens} tokens (model.context_tokens - rollout.max_new_tokens)"
        )
        if not prompts:
            raise DataError(
                f"{dropped}: data.overlong = drop leaves none",
                "raise model.context_tokens, or lower rollout.max_new_tokens",
            )
        report(f"{dropped} and are dropped (data.overlong = drop)")
    return prompts


def check_rows(path: str, setting: str, config: Config) -> int:
    """Returns the number of rows, for preflight: all rows are read, and the first chat is rendered.

    Raises ConfigError or DataError as `read_prompts`, but tokenizes no row.
    """
    count, rendered = 0, False
    for number, _, fields in read_rows(path, setting, config.reward.function):
        count += 1
        if not rendered and (config.data.chat_template or isinstance(fields["prompt"], list)):
            rendered = True
            try:
                _render(fields["prompt"], config, Tokenizer(config.model.path))
            except (ConfigError, DataError) as e:
                row = f"{setting} = {path}, row {number}"
                raise type(e)(f"{row}: {e.problem}", e.remedy) from None
    return count


def record_data(run_dir: Path, config: Config) -> None:
    """Keeps the digests of the datasets in the run, for `changed_data` at its next start."""
    files.write_atomic(run_dir / DIGESTS_FILE, msgspec.json.encode(_digests(config)))


def changed_data(run_dir: Path, config: Config) -> str:
    """Returns which dataset has changed since the last start of the run, "" if none has.

    A resumed run continues the order of its prompts, so it needs the same rows.
    """
    path = run_dir / DIGESTS_FILE
    recorded = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
    for setting, digest in _digests(config).items():
        if recorded.get(setting, digest) != digest:
            file = getattr(config.data, setting.removeprefix("data."))
            return (
                f"{setting} = {file} has other content than when the run in {run_dir} was started; "
                "restore the file, choose another run.dir, or start over with --from-scratch"
            )
    return ""


def _digests(config: Config) -> dict[str, str]:
    paths = {"data.train": config.data.train, "data.eval": config.data.eval}
    return {setting: files.digest(Path(path)) for setting, path in paths.items() if path}


def _parse(line: bytes, reward_function: str) -> dict[str, Any]:
    """Returns a row's fields. Raises DataError with the problem alone."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError("not UTF-8 but UTF-16: save the file as UTF-8")
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError as e:
        raise DataError(f"not JSON: {e}") from None
    except UnicodeDecodeError:
        raise DataError("not UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply") from None
    if not isinstance(fields, dict):
        raise DataError("not a JSON object")
    if not isinstance(fields.get("prompt"), str | list) or not fields["prompt"]:
        raise DataError("no `prompt`")
    if reward_function == "math":
        math_rows.read_answer(fields)
    if reward_function == "code":
        read_tests(fields)
    return fields


def _prompt_ids(prompt: str | list[Any], config: Config, tokenizer: Tokenizer) -> np.ndarray:
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
                "write the prompts as text, or add chat_template.jinja to the model folder",
            )
        raise ConfigError(
            f"data.chat_template = true, but {model}",
            "set data.chat_template to false, or add chat_template.jinja to the model folder",
        )
    data = config.data
    return tokenizer.render_chat(messages, data.chat_template_name, data.chat_template_kwargs)
