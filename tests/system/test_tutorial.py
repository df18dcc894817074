"""Types docs/tutorial.md: writes its files and runs its commands, on a random model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from needs import needs_engine
from paths import ROOT
from tiny_model import make_dataset, make_model
from whole_runs import assert_no_process_left

from megatron_async_rl.observability.sample_log import read_samples
from megatron_async_rl.observability.status import read_status

pytestmark = needs_engine
# as that of the quickstart's model, which only joins the contents
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_tutorial_leads_to_an_own_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    # the result of step 1
    model = make_model(tmp_path / "runs" / "tiny_model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "runs" / "arithmetic").mkdir()
    make_dataset(tmp_path / "runs" / "arithmetic" / "train.jsonl", 60)
    make_dataset(tmp_path / "runs" / "arithmetic" / "eval.jsonl", 8, 100)
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")
    (tmp_path / "my_project").mkdir()
    for name, text in re.findall(r"```\w+ (my_project/\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert len(commands) == 5

    environment = os.environ | {"MEGATRON_ASYNC_RL_PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-e", "-x", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert_no_process_left(tmp_path / "runs")

    run = tmp_path / "runs" / "my_run"
    status = read_status(run)
    assert (status.state, status.version) == ("finished", 6)
    samples = list(read_samples(run))
    assert len(samples) == 6 * 8 * 4
    turns = {len(line.turns) for line in samples}
    assert 2 in turns and turns <= {1, 2}
    evaluated = {
        json.loads(path.read_text())["version"]: json.loads(path.read_text())["mode"]
        for path in (run / "evaluations").glob("v*.json")
    }
    assert {0, 6} <= evaluated.keys()
    assert "held_server" in evaluated.values()
