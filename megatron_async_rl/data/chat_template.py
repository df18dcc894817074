"""Renders chat messages with the model's chat template, exactly as transformers does.

The rendering is transformers' own; this module chooses the template and the special tokens in the
model folder as `PreTrainedTokenizer.apply_chat_template` chooses them. transformers is imported by
`render` alone, and without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.model.model_files import read_json, read_text

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

PYTHON_TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs a Python program and returns what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program."}},
            "required": ["code"],
        },
    },
}


def template_variables(config: Config) -> dict[str, Any]:
    """Returns the variables for the chat template: data.chat_template_kwargs, and the tools."""
    tools = {"tools": [PYTHON_TOOL]} if config.rollout.workflow == "python_tool" else {}
    return tools | config.data.chat_template_kwargs


def read_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Returns the templates of a model folder by name; a single one is named `default`.

    chat_template.jinja and additional_chat_templates/NAME.jinja replace those of
    tokenizer_config.json.
    """
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {path.stem: path for path in named}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read_text(path) for name, path in files.items()}
    template = tokenizer_config.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        try:
            return {entry["name"]: entry["template"] for entry in template}
        except (KeyError, TypeError):
            raise DataError(
                f"{folder / 'tokenizer_config.json'}: chat_template is not a list of objects with "
                "`name` and `template`",
                "correct it",
            ) from None
    return dict(template) if isinstance(template, dict) else {}


def read_special_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Returns the texts of the special tokens that the model names, such as `bos_token`."""
    named: dict[str, Any] = {}
    file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in tokenizer_config:  # older folders
        named |= read_json(file)
    named |= tokenizer_config
    named |= named.get("model_specific_special_tokens") or {}
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    names = [name for name in named if name.removesuffix("_token") in _SPECIAL_TOKENS]
    for mapping in (extra, named.get("model_specific_special_tokens")):
        names += list(mapping) if isinstance(mapping, dict) else []
    texts = {name: _text(named[name]) for name in names}
    return {name: text for name, text in texts.items() if text}


def choose_template(
    templates: dict[str, str], name: str | None, model_path: str | Path, has_tools: bool = False
) -> str:
    """Returns the template named by data.chat_template_name. Raises ConfigError.

    Without a name it is `tool_use` for prompts with tools, or else `default`, as in transformers.
    """
    known = ", ".join(sorted(templates))
    if name is None and has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if name is None and "default" not in templates:
        raise ConfigError(
            f"model.path = {model_path} has several chat templates and none named default: {known}",
            "choose one with data.chat_template_name",
        )
    chosen = name or "default"
    if chosen not in templates:
        raise ConfigError(
            f"data.chat_template_name = {chosen}: the model's chat templates are: {known}",
            "set it to one of these",
        )
    return templates[chosen]


def render(
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    variables: dict[str, Any],
) -> str:
    """Returns the text up to the start of the response. Raises DataError if the template fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise DataError(
            "`prompt` is a list, so its entries must be messages: {role, content}",
            'write them as [{"role": "user", "content": "..."}]',
        )
    chosen: dict[str, Any] = {"add_generation_prompt": True} | special_tokens | variables
    if chosen.get("continue_final_message") and chosen["add_generation_prompt"]:
        raise DataError(
            "data.chat_template_kwargs: continue_final_message excludes add_generation_prompt",
            "set data.chat_template_kwargs.add_generation_prompt=false too",
        )
    # as apply_chat_template: a key without a value is a key that is not there
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    for message in given:
        if isinstance(content := message.get("content"), list):
            message["content"] = "".join(map(_text_of_part, content))
    try:
        rendered = render_jinja_template(
            conversations=[given],
            chat_template=template,
            **chosen,
        )
    except Exception as e:  # a template is the model author's program and may raise anything
        raise DataError(
            f"the chat template rejects this prompt: {e or type(e).__name__}",
            "correct the messages, the template, or data.chat_template_kwargs",
        ) from None
    return rendered[0][0]


def _text_of_part(part: Any) -> str:
    """Templates of text models would leave out a list of parts, or render it as Python does."""
    if isinstance(part, dict) and isinstance(text := part.get("text"), str):
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(
        f"content parts of type {kind!r} are not supported", "write the content as a text"
    )


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
