"""A whole run of agents that know nothing of the project: of two clients, and of a framework.

An agent is killed, another raises, and the server is killed in the middle of a stream.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import loop_agent
import numpy as np
import pytest
from needs import needs_engine
from whole_runs import (
    FinishedRun,
    RunInputs,
    assert_no_process_left,
    load_policy,
    start_run,
)

from megatron_async_rl.observability.sample_log import SampleLine

pytestmark = needs_engine
STEPS, CONTEXT_TOKENS = 4, 1024
# the token that ends a turn stands behind each answer of the assistant
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def run(run_inputs: RunInputs, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("agents")
    model = shutil.copytree(run_inputs.model, folder / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = json.loads((model / "config.json").read_text())
    settings["max_position_embeddings"] = 2 * CONTEXT_TOKENS
    (model / "config.json").write_text(json.dumps(settings))
    (folder / "faults").mkdir()
    path = RunInputs(model, run_inputs.train, run_inputs.eval).config(
        folder / "run",
        run={"steps": STEPS},
        model={"path": str(model), "context_tokens": CONTEXT_TOKENS},
        rollout={
            "agent": "loop_agent:converses",
            "max_new_tokens": 24,
            "max_concurrent_samples": 8,
            "max_attempts": 5,
        },
        evaluation={"sets": {}},
        monitor={"sample_tokens": 16},
    )
    child = start_run(path, **{loop_agent.FAULTS: str(folder / "faults")})
    output, errors = child.communicate(timeout=500)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    return FinishedRun(folder / "run", output)


def test_every_kind_of_agent_is_trained_on_the_tokens_that_the_engine_sampled(
    run: FinishedRun,
) -> None:
    assert run.status.version == STEPS
    assert len(run.samples) == STEPS * 16
    kinds: dict[str, list[SampleLine]] = {kind: [] for kind in loop_agent.KINDS}
    for line in run.samples:
        number = int(line.prompt_id.rpartition("-")[2])
        kinds[loop_agent.kind_of({"answer": 2 * number + 1})].append(line)
        assert 0 <= line.reward <= 1
        check_logprobs(run.folder, line)
    assert all(kinds.values())
    assert {len(line.turns) for line in kinds["openai"]} <= {3, 4}
    assert {len(line.starts) for line in kinds["openai"]} <= {0, 2}
    assert all(len(line.turns) == 2 and not line.starts for line in kinds["anthropic"])
    assert all(len(line.turns) == loop_agent.MAX_STEPS + 1 for line in kinds["smolagents"])


def test_faults_of_agents_and_of_the_server_cost_no_more_than_an_attempt(
    run: FinishedRun,
) -> None:
    faults = run.folder.parent / "faults"
    assert {"killed", "raised", "server"} <= {path.name for path in faults.iterdir()}
    error = (faults / "error").read_text()
    assert "Error code: 503" in error and "the server failed" in error
    log = run.log("rollout-0")
    assert "signal SIGKILL" in log and "RuntimeError: of the agent" in log
    ledger = run.status.ledger
    dropped = sum(count for name, count in ledger.items() if name.startswith("dropped."))
    assert ledger["admitted"] == ledger["trained"] + dropped
    assert ledger["trained"] == STEPS * 4 and ledger["pending"] == 0
    assert "dropped.generation_failed" not in ledger
    assert_no_process_left(run.folder)


def check_logprobs(run_dir: Path, line: SampleLine) -> None:
    """The logprob of each trained token equals that of a prefill under the weights it names."""
    import torch

    edges = [*(line.starts or [0]), len(line.ids)]
    versions = np.concatenate([[version] * count for version, count in line.versions])
    done = 0
    for start, end in itertools.pairwise(edges):
        turns = [(a - start, b - start) for a, b in sorted(line.turns) if start <= a < end]
        taken = np.concatenate([np.arange(a, b) for a, b in turns])
        expected, labels = line.logprobs[done:][: len(taken)], versions[done:][: len(taken)]
        ids = torch.tensor(line.ids[start:end], dtype=torch.long)
        for version in np.unique(labels):
            with torch.no_grad():
                logits = load_policy(run_dir, int(version))(input_ids=ids[None]).logits[0, :-1]
            fresh = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
            here = labels == version
            np.testing.assert_allclose(fresh[taken - 1][here], expected[here], atol=1e-3)
        done += len(taken)
    assert done == len(line.logprobs)
