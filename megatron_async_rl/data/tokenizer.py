"""A Hugging Face folder's tokenizer on the `tokenizers` library alone: no transformers, no torch at import."""

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
    """Digest of what text becomes under this folder: vocabulary, merges, special tokens, chat template.

    Of the content, not of how the files are written: two hosts with the same one may have copies that were saved anew.
    """
    folder = Path(model_path)
    tokenizer, settings = (
        _read_json(folder / "tokenizer.json"),
        _read_json(folder / "tokenizer_config.json"),
    )
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    shared = [tokenizer.get(part) for part in parts] + [
        settings.get(part) for part in ("chat_template", "bos_token")
    ]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def vocabulary_size(model_path: str | Path) -> int:
    """Token ids that the model has a row for. One beyond them, asked for, ends the engine."""
    return int(json.loads((Path(model_path) / "config.json").read_text())["vocab_size"])


class Tokenizer:
    """Text to token ids and back; knows the tokens that end a response.

    Raises ConfigError when the model folder has no tokenizer.
    """

    def __init__(self, model_path: str | Path) -> None:
        folder = Path(model_path)
        if not (folder / "tokenizer.json").exists():
            raise ConfigError(
                f"model.path = {folder}: no tokenizer.json there; save the model with its fast tokenizer"
            )
        self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        self._settings = _read_json(folder / "tokenizer_config.json")
        self.vocab_size: int = self._backend.get_vocab_size()
        self.bos_id = self._special("bos_token")
        self.eos_ids = self._eos_ids(folder)
        if not self.eos_ids:
            raise ConfigError(
                f"model.path = {folder}: neither generation_config.json nor the tokenizer names an eos token"
            )

    def encode(self, text: str, add_bos: bool = False) -> np.ndarray:
        """[num_tokens] int32; special tokens only where they stand in the text, and bos on request."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return np.asarray(ids, np.int32)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The messages as the model's chat template writes them, ready for the assistant's answer."""
        template = self._settings.get("chat_template")
        if not isinstance(template, str):
            raise ConfigError(
                "data.chat_template = true, but the model's tokenizer_config.json has no chat_template; set it to false"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        special = {name: self._token_text(name) for name in ("bos_token", "eos_token", "pad_token")}
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **special
        )

    def _token_text(self, name: str) -> str | None:
        token = self._settings.get(name)
        return token["content"] if isinstance(token, dict) else token

    def _special(self, name: str) -> int | None:
        text = self._token_text(name)
        return None if text is None else self._backend.token_to_id(text)

    def _eos_ids(self, folder: Path) -> frozenset[int]:
        named = _read_json(folder / "generation_config.json").get("eos_token_id")
        ids = set(named if isinstance(named, list) else [] if named is None else [named])
        eos = self._special("eos_token")
        return frozenset(ids if eos is None else ids | {eos})


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _raise(message: str) -> None:
    raise DataError(f"the chat template refuses this prompt: {message}")
