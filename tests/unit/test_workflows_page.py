"""The example of docs/workflows.md runs, token by token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chat_model import END, Script, make_chat_tokenizer
from paths import ROOT

from megatron_async_rl import hooks

PAGE = ROOT / "docs" / "workflows.md"


def test_example_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"^```python\n# my_workflow.py\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "page_workflow.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    workflow = hooks.workflow("page_workflow:HintThenAnswer", {"prefix": "Think of this: "})
    tokenizer = make_chat_tokenizer(tmp_path / "model")
    script = Script(
        tokenizer,
        [f"5{END}", f"4{END}"],
        {"4": 1.0},
        {"data.chat_template": True},
        row={"hint": "it is even"},
    )
    sample = script.run(workflow, "2+2?")
    assert (sample.text, sample.discount) == ("4", 0.5)
    assert "Think of this: it is even" in tokenizer.decode_all(sample.ids.tolist())
    script = Script(tokenizer, [f"4{END}"], {"4": 1.0}, row={"hint": "it is even"})
    assert script.run(workflow, "2+2?").discount == 1.0


def test_page_names_every_workflow_and_its_options() -> None:
    page = PAGE.read_text()
    for name in hooks.HOOKS["rollout.workflow"].built_in:
        assert f"`{name}`" in page
        if name in ("multi_turn_math", "python_tool"):
            section = page.split(f"## {name}\n")[1].split("\n## ")[0]
            with pytest.raises(Exception, match="the options of") as refused:
                hooks.workflow(name, {"unknown": 1})
            options = str(refused.value).rpartition(" are ")[2].split(", ")
            assert re.findall(r"^\| `(\w+)` \|", section, re.M) == options
