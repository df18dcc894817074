"""Chat templates are rendered as transformers renders them, from every place that may hold them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_model

from megatron_async_rl.config import load
from megatron_async_rl.config.config import Config
from megatron_async_rl.config.datasets import SourceConfig
from megatron_async_rl.data import chat_template
from megatron_async_rl.data.dataset import check_source, read_source
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trimmed blocks": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n"
    "U: {{ m.content | trim }}\n  {% else %}\nA: {{ m.content }}\n  {%- endif %}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<é>' | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "absent token": "{% if cls_token is defined %}C{% endif %}{{ sep_token }}|{{ eos_token }}|"
    "{{ pad_token }}|{{ messages[0].content }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{{ loop.index0 }}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "thinking": "{{ messages[-1].content }}{% if enable_thinking is defined"
    " and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "null fields": "{% for m in messages %}{{ 'name' in m }}{{ m.get('name', 'x') }}{% endfor %}",
    "tools": "{% if tools %}T{% endif %}{% if tools is not none %}N{% endif %}{{ documents }}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}"
    "{% for m in messages %}{{ f(m.role) }}{% endfor %}",
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be short & <clear>. ", "name": None},
    {"role": "user", "content": "1+2=\n\u00e9\u2028?", "name": "u"},
]
VARIABLES: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reference(folder: Path, variables: dict[str, Any], name: str | None = None) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, chat_template=name, **variables
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    for variables in VARIABLES:
        rendered = Tokenizer(folder).render_chat(MESSAGES, None, variables)
        assert rendered == reference(folder, variables)


@pytest.mark.parametrize("name", [None, "default", "short"])
@pytest.mark.parametrize("place", ["list", "files", "file over config"])
def test_named_templates_are_found_where_transformers_finds_them(
    folder: Path, place: str, name: str | None
) -> None:
    templates = {"default": CHATML, "short": "{{ messages[-1].content }}"}
    if place == "list":
        listed = [{"name": key, "template": text} for key, text in templates.items()]
        set_config(folder, chat_template=listed)
    else:
        (folder / "chat_template.jinja").write_text(CHATML)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "short.jinja").write_text(templates["short"])
    if place == "file over config":
        set_config(folder, chat_template="not this one")
    assert Tokenizer(folder).render_chat(MESSAGES, name) == reference(folder, {}, name)


def test_prompts_with_tools_take_the_template_for_tools(folder: Path) -> None:
    listed = {"default": "D{{ tools }}", "tool_use": "T{{ tools | tojson }}", "rag": "R"}
    set_config(folder, chat_template=[{"name": n, "template": t} for n, t in listed.items()])
    for tools in (None, [], [chat_template.PYTHON_TOOL]):
        for name in (None, "default", "rag"):
            rendered = Tokenizer(folder).render_chat(MESSAGES, name, {"tools": tools})
            assert rendered == reference(folder, {"tools": tools}, name)


def test_last_message_is_continued_without_a_generation_prompt(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer, messages = Tokenizer(folder), [*MESSAGES, {"role": "assistant", "content": "I"}]
    with pytest.raises(DataError, match="continue_final_message excludes add_generation_prompt"):
        tokenizer.render_chat(messages, None, {"continue_final_message": True})
    chosen = {"continue_final_message": True, "add_generation_prompt": False}
    assert tokenizer.render_chat(messages, None, chosen).endswith("<|im_start|>assistant\nI")


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "special_tokens_map.json",
])  # fmt: skip
@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"version https://git-lfs\n", b"[1]", None])
def test_damaged_file_of_a_model_folder_is_named(
    folder: Path, name: str, content: bytes | None
) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    if name == "chat_template.jinja" and content and content[0] != 0xFF:
        return  # any text is a template
    with pytest.raises(DataError, match=f"{name} .*; download the model again"):
        Tokenizer(folder)


def test_unknown_or_ambiguous_template_names_the_known_ones(folder: Path) -> None:
    listed = [{"name": "a", "template": "A"}, {"name": "b", "template": "B"}]
    set_config(folder, chat_template=listed)
    with pytest.raises(ConfigError, match=r"none named default: a, b.*data\.chat_template_name"):
        Tokenizer(folder).render_chat(MESSAGES)
    with pytest.raises(ConfigError, match=r"data\.chat_template_name = c: .* a, b"):
        Tokenizer(folder).render_chat(MESSAGES, "c")


def test_response_ends_at_the_tokens_at_which_the_server_ends_it(folder: Path) -> None:
    """SGLang reads config.json and generation_config.json."""
    own = Tokenizer(folder).eos_ids
    for file, eos in (("config.json", [3, 5]), ("generation_config.json", 4)):
        path = folder / file
        fields = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(fields | {"eos_token_id": eos}))
    assert Tokenizer(folder).eos_ids - own <= {3, 4, 5} <= Tokenizer(folder).eos_ids
    (folder / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match=r"config\.json: eos_token_id = '</s>' is not a token id"):
        Tokenizer(folder)


def test_text_parts_of_a_content_are_joined_and_others_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content | trim }}")
    parts: list[Any] = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]
    tokenizer = Tokenizer(folder)
    assert tokenizer.render_chat([{"role": "user", "content": parts}]) == "1+2="
    parts.append({"type": "image_url", "image_url": {}})
    with pytest.raises(DataError, match="parts of type 'image_url' are not supported; write"):
        tokenizer.render_chat([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system') }}",
        "{{ messages[7].content }}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages.append(1) }}",
    ],
)
def test_any_error_of_a_template_is_a_data_error_with_the_row(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    config, path = settings(folder, chat_template=True, prompt="1+2=")
    for read in (
        lambda: check_source(SourceConfig(path=path), "data.train", config),
        lambda: prompts(config),
    ):
        with pytest.raises(DataError, match=r"data\.train = .*, row 1: the chat template rejects"):
            read()


@pytest.mark.parametrize(
    ("prompt", "chat", "problem"),
    [
        (
            "1+2=",
            True,
            r"row 1: data\.chat_template = true, but .* no chat template; set data\.chat",
        ),
        ([MESSAGES[1]], False, "row 1: .* no chat template, and the prompt is a list of messages"),
    ],
)
def test_missing_template_is_found_before_a_start(
    folder: Path, prompt: Any, chat: bool, problem: str
) -> None:
    config, path = settings(folder, chat_template=chat, prompt=prompt)
    with pytest.raises(ConfigError, match=problem):
        check_source(SourceConfig(path=path), "data.train", config)
    with pytest.raises(ConfigError, match=problem):
        prompts(config)


def test_template_variables_are_a_setting(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ digit }}{{ messages[0].content }}")
    config, _ = settings(folder, prompt="+2", chat_template=True, chat_template_kwargs={"digit": 7})
    assert Tokenizer(folder).decode(prompts(config)[0].ids) == "7+2"


@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("setting", [None, False, True])
def test_bos_is_put_as_the_tokenizer_puts_it(
    folder: Path, add_bos_token: bool | None, processor: bool, setting: bool | None
) -> None:
    set_config(
        folder,
        bos_token="<|pad|>",
        **({} if add_bos_token is None else {"add_bos_token": add_bos_token}),
    )
    if processor:
        path = folder / "tokenizer.json"
        piece = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}
        sequence = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}}
        processing = {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processing}))
    has_bos = bool(Tokenizer(folder).encode("1+2", add_bos=setting)[0] == 1)
    expected = (processor and add_bos_token is not False) if setting is None else setting
    assert has_bos is expected
    if setting is None and add_bos_token is not False:
        from transformers import AutoTokenizer

        assert (AutoTokenizer.from_pretrained(folder)("1+2").input_ids[0] == 1) is has_bos


def test_other_tokens_before_a_text_are_put_as_the_tokenizer_puts_them(folder: Path) -> None:
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<|pad|>", "<|unk|>")]
    processing = {
        "type": "TemplateProcessing",
        "single": [*pieces, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for number, name in ((1, "<|pad|>"), (0, "<|unk|>"))
        },
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processing}))
    ids = Tokenizer(folder).encode("1+2", add_bos=None).tolist()
    assert ids == AutoTokenizer.from_pretrained(folder)("1+2").input_ids
    assert len(ids) == 5
    assert len(Tokenizer(folder).encode("1+2", add_bos=False)) == 3


def test_rendering_imports_no_torch(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    program = (
        "import sys; from megatron_async_rl.data.tokenizer import Tokenizer; "
        "tokenizer = Tokenizer(sys.argv[1]); print('transformers' in sys.modules); "
        "tokenizer.render_chat([{'role': 'user', 'content': '1'}]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_special_tokens_are_those_that_the_folder_names(folder: Path) -> None:
    set_config(folder, bos_token={"content": "<s>", "lstrip": False}, unk_token=None)
    (folder / "special_tokens_map.json").write_text('{"cls_token": "<c>", "bos_token": "<old>"}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = chat_template.read_special_tokens(folder, config)
    assert tokens["bos_token"] == "<s>" and tokens["cls_token"] == "<c>"
    assert "unk_token" not in tokens and "mask_token" not in tokens


def settings(folder: Path, prompt: Any, **data: Any) -> tuple[Config, str]:
    path = folder.parent / "data.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "answer": "3"}) + "\n")
    tree = {
        "run": {"dir": "unused", "steps": 1},
        "model": {"path": str(folder), "context_tokens": 40},
        "data": {"train": str(path)} | data,
        "rollout": {"max_new_tokens": 30},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
    }
    return load.from_tree(tree), str(path)


def prompts(config: Config) -> list[Any]:
    return read_source(
        SourceConfig(path=config.data.train), "data.train", config, Tokenizer(config.model.path)
    )
