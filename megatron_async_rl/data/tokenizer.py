"""A Hugging Face folder's tokenizer, with the `tokenizers` library.

Chat templates are rendered by transformers (chat_template.py), which only then is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from megatron_async_rl.data import chat_template
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model.model_files import REMEDY, read_json

_RESPONSE = "RESPONSE-7f3a"  # stands for a response in a rendered chat


def fingerprint(model_path: str | Path) -> str:
    """Returns a digest of all that decides how text becomes tokens in this folder.

    It covers vocabulary, merges, special tokens and chat template, independent of how the files are
    formatted: copies on two hosts may have been saved by different library versions.
    """
    folder = Path(model_path)
    tokenizer = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    content = [tokenizer.get(part) for part in parts]
    content += [chat_template.read_templates(folder, settings)]
    content += [settings.get(part) for part in ("bos_token", "add_bos_token")]
    content += [tokenizer.get("post_processor")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Tokenizer:
    """Converts text to token ids and back; knows the tokens that end a response.

    `kept_tokens`: special tokens that stay in a decoded text, such as reward.thinking_tags. Raises
    ConfigError if the model folder has no fast tokenizer or names no eos token, DataError if one of
    its files is damaged.
    """

    def __init__(self, model_path: str | Path, kept_tokens: Collection[str] = ()) -> None:
        folder = Path(model_path)
        if not (folder / "tokenizer.json").exists():
            raise ConfigError(
                f"model.path = {folder} has no tokenizer.json", "save the model's fast tokenizer"
            )
        try:
            self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises no other type
            raise DataError(f"{folder / 'tokenizer.json'} cannot be read: {e}", REMEDY) from None
        self._folder = folder
        settings = read_json(folder / "tokenizer_config.json")
        self.templates = chat_template.read_templates(folder, settings)
        self._special_tokens = chat_template.read_special_tokens(folder, settings)
        self._kept = {
            number: token.content
            for number, token in self._backend.get_added_tokens_decoder().items()
            if token.special and token.content in kept_tokens
        }
        self.vocab_size: int = self._backend.get_vocab_size()
        self.bos_id = self._special_id("bos_token")
        self.unk_id = self._special_id("unk_token")
        self._prefix = self._own_prefix(settings.get("add_bos_token") is not False)
        self.eos_ids = self._eos_ids(folder)
        if not self.eos_ids:
            raise ConfigError(
                f"model.path = {folder}: no file names an eos token",
                "add eos_token_id to generation_config.json",
            )

    def encode(self, text: str, add_bos: bool | None = False) -> np.ndarray:
        """Returns [num_tokens] int32. Special tokens are those written in the text, and BOS.

        `add_bos`: None does as the model's tokenizer does, which may put other tokens there.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        prefix = self._prefix
        if add_bos is not None:
            prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
        return np.asarray([*prefix, *ids], np.int32)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Returns the text without special tokens, except `kept_tokens`."""
        numbers = [int(i) for i in ids]
        parts: list[str] = []
        begin = 0
        for place in (i for i, number in enumerate(numbers) if number in self._kept):
            parts += [self._decode(numbers[begin:place]), self._kept[numbers[place]]]
            begin = place + 1
        return "".join([*parts, self._decode(numbers[begin:])])

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: list[int]) -> str:
        """Decodes special tokens too."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        template_name: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Renders messages with the model's chat template, up to the start of the response.

        Raises ConfigError without that template, DataError if it rejects the messages.
        """
        variables = variables or {}
        has_tools = variables.get("tools") is not None
        template = chat_template.choose_template(
            self.templates, template_name, self._folder, has_tools
        )
        return chat_template.render(template, messages, self._special_tokens, variables)

    def render_next_turn(
        self,
        messages: list[dict[str, Any]],
        template_name: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Renders the text after a response: its end, `messages`, the start of the next response.

        Raises ConfigError and DataError like `render_chat`.
        """
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _RESPONSE}]
        text = self.render_chat([*before, *messages], template_name, variables)
        _, found, after = text.rpartition(_RESPONSE)
        if not found:
            raise DataError(
                "the chat template leaves out a response before the last message",
                "set data.chat_template_name to one that keeps it, or use a workflow of one turn",
            )
        return after

    def _own_prefix(self, with_bos: bool) -> list[int]:
        """Returns the tokens that the tokenizer itself, by its post-processor, puts before a text:
        BOS, or such as [gMASK] and <sop> of GLM."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        plain = self._backend.encode("a", add_special_tokens=False).ids
        added = len(ids) - len(plain)
        starts = (n for n in range(added + 1) if plain and ids[n : n + len(plain)] == plain)
        prefix = ids[: next(starts, 0)]
        return [number for number in prefix if with_bos or number != self.bos_id]

    def _special_id(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _eos_ids(self, folder: Path) -> frozenset[int]:
        """Returns the ids at which the server ends a response: it reads the same files."""
        ids: list[int] = []
        for file in (folder / "config.json", folder / "generation_config.json"):
            named = read_json(file).get("eos_token_id")
            ids += named if isinstance(named, list) else [] if named is None else [named]
            if not all(type(number) is int for number in ids):
                raise DataError(f"{file}: eos_token_id = {named!r} is not a token id", "correct it")
        eos = self._special_id("eos_token")
        return frozenset(ids if eos is None else [*ids, eos])
