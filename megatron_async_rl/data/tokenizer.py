"""A Hugging Face folder's tokenizer, with the `tokenizers` library and without transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from megatron_async_rl.errors import ConfigError, DataError


def fingerprint(model_path: str | Path) -> str:
    """Returns a digest of all that decides how text becomes tokens in this folder.

    It covers vocabulary, merges, special tokens and chat template, independent of how the files are
    formatted: copies on two hosts may have been saved by different library versions.
    """
    folder = Path(model_path)
    tokenizer = _read_json(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    content = [tokenizer.get(part) for part in parts]
    content += [settings.get(part) for part in ("chat_template", "bos_token")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Tokenizer:
    """Converts text to token ids and back; knows the tokens that end a response.

    Raises ConfigError if the model folder has no fast tokenizer or names no eos token.
    """

    def __init__(self, model_path: str | Path) -> None:
        folder = Path(model_path)
        if not (folder / "tokenizer.json").exists():
            raise ConfigError(
                f"model.path = {folder} has no tokenizer.json", "save the model's fast tokenizer"
            )
        self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        self._settings = _read_json(folder / "tokenizer_config.json")
        self.vocab_size: int = self._backend.get_vocab_size()
        self.bos_id = self._special_id("bos_token")
        self.eos_ids = self._eos_ids(folder)
        if not self.eos_ids:
            raise ConfigError(
                f"model.path = {folder}: neither generation_config.json nor the tokenizer names an "
                "eos token",
                "add eos_token_id to generation_config.json",
            )

    def encode(self, text: str, add_bos: bool = False) -> np.ndarray:
        """Returns [num_tokens] int32. Special tokens are those written in the text, and bos."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Renders messages with the model's chat template, up to the start of the response.

        Raises ConfigError without a template, DataError if the template rejects the messages.
        """
        template = self._settings.get("chat_template")
        if not isinstance(template, str):
            raise ConfigError(
                "data.chat_template = true, but the model's tokenizer_config.json has no "
                "chat_template",
                "set it to false",
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _reject
        special = {name: self._token_text(name) for name in ("bos_token", "eos_token", "pad_token")}
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **special
        )

    def _token_text(self, name: str) -> str | None:
        token = self._settings.get(name)
        return token["content"] if isinstance(token, dict) else token

    def _special_id(self, name: str) -> int | None:
        text = self._token_text(name)
        return None if text is None else self._backend.token_to_id(text)

    def _eos_ids(self, folder: Path) -> frozenset[int]:
        named = _read_json(folder / "generation_config.json").get("eos_token_id")
        ids = set(named if isinstance(named, list) else [] if named is None else [named])
        eos = self._special_id("eos_token")
        return frozenset(ids if eos is None else ids | {eos})


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _reject(message: str) -> None:
    raise DataError(f"the chat template rejects this prompt: {message}")
