"""The prompt stream: rows of a JSONL file in a seeded order, epoch after epoch, resumable at any position.

The order depends on seed and epoch alone, so `PromptStream(..., start=n)` after a crash goes on exactly where the first
n prompts of the earlier run ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_async_rl.config.config import Config
from megatron_async_rl.data.code_tests import read_tests
from megatron_async_rl.data.tokenizer import Tokenizer, vocabulary_size
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Prompt


class PromptStream:
    def __init__(self, prompts: list[Prompt], seed: int, start: int = 0) -> None:
        self._prompts = prompts
        self._seed = seed
        self._epoch = -1
        self.position = start  # prompts handed out so far, over all epochs

    def next(self) -> Prompt:
        epoch, offset = divmod(self.position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts)),
            )
        self.position += 1
        return self._prompts[self._order[offset]]


def read_prompts(path: str, setting: str, config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """Reads, checks and tokenizes a whole dataset. Raises DataError naming the file, the row and what is wrong."""
    prompts: list[Prompt] = []
    seen: set[str] = set()
    vocab_size = vocabulary_size(config.model.path)
    room = config.model.context_tokens - config.rollout.max_new_tokens
    for number, line in enumerate(_lines(path, setting), 1):
        if not line.strip():
            continue
        where = f"{setting} = {path}, row {number}"
        row = _parse(line, where, config.reward.function)
        ids = _prompt_ids(row, config, tokenizer)
        if not 0 < len(ids) <= room:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, must be 1 to {room} (model.context_tokens - "
                f"rollout.max_new_tokens); shorten it, or change one of these settings"
            )
        if ids.max() >= vocab_size:
            raise DataError(
                f"{where}: token id {ids.max()} is outside the model's vocabulary of {vocab_size}, which would end the "
                f"engine; model.path = {config.model.path} has a tokenizer of another model"
            )
        prompt_id = str(row.get("id", number))
        if prompt_id in seen:
            raise DataError(f"{where}: id {prompt_id!r} stands twice; ids must differ")
        seen.add(prompt_id)
        prompts.append(Prompt(prompt_id=prompt_id, ids=ids, row=row))
    if not prompts:
        raise DataError(
            f"{setting} = {path} has no rows; a row is a JSON object with `prompt` and `answer`"
        )
    return prompts


def _lines(path: str, setting: str) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{setting} = {path} cannot be read: {e}; give a JSONL file") from None


def _parse(line: str, where: str, reward_function: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"{where} is not JSON: {e}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), (str, list)):
        raise DataError(
            f"{where} has no text `prompt`; a row is a JSON object with `prompt` and `answer`"
        )
    if reward_function == "math" and row.get("answer") in (None, ""):
        raise DataError(
            f"{where} has no `answer`, which reward.function = math needs; add it, or take the row out"
        )
    if reward_function == "code":
        try:
            read_tests(row)
        except DataError as e:
            raise DataError(f"{where}: {e}") from None
    return row


def _prompt_ids(row: dict[str, Any], config: Config, tokenizer: Tokenizer) -> np.ndarray:
    prompt = row["prompt"]
    if isinstance(prompt, list) or config.data.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return tokenizer.encode(tokenizer.render_chat(messages))
    return tokenizer.encode(prompt, add_bos=config.data.add_bos)
