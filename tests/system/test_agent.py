"""A whole run that trains an agent which talks to OpenAI's API and knows nothing of the project."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
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
STEPS = 4
# the token that ends a turn stands behind each answer of the assistant
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
)


def test_agent_is_trained_on_the_tokens_that_the_engine_sampled(
    run_inputs: RunInputs, tmp_path: Path
) -> None:
    model = shutil.copytree(run_inputs.model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    folder = tmp_path / "run"
    path = RunInputs(model, run_inputs.train, run_inputs.eval).config(
        folder,
        run={"steps": STEPS},
        rollout={"agent": "loop_agent:asks_again", "max_concurrent_samples": 8},
        evaluation={"sets": {}},
        monitor={"sample_tokens": 16},
    )
    child = start_run(path)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, output[-3000:] + errors[-3000:]
    run = FinishedRun(folder, output)
    assert run.status.version == STEPS
    assert len(run.samples) == STEPS * 16
    assert_no_process_left(folder)

    assert {len(line.turns) for line in run.samples} <= {3, 4}
    branched = [line for line in run.samples if line.starts]
    assert branched and all(len(line.starts) == 2 for line in branched)
    for line in run.samples:
        assert 0 <= line.reward <= 1
        check_logprobs(folder, line)


def check_logprobs(run_dir: Path, line: SampleLine) -> None:
    """The logprob of each trained token equals that of a prefill under the weights it names."""
    import torch

    edges = [*(line.starts or [0]), len(line.ids)]
    versions = np.concatenate([[version] * count for version, count in line.versions])
    done = 0
    for start, end in itertools.pairwise(edges):
        turns = [(a - start, b - start) for a, b in line.turns if start <= a < end]
        taken = np.concatenate([np.arange(a, b) for a, b in turns])
        expected, labels = line.logprobs[done:][: len(taken)], versions[done:][: len(taken)]
        ids = torch.tensor(line.ids[start:end], dtype=torch.long)
        for version in np.unique(labels):
            with torch.no_grad():
                logits = load_policy(run_dir, int(version))(input_ids=ids[None]).logits[0, :-1]
            fresh = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
            here = labels == version
            np.testing.assert_allclose(fresh[taken - 1][here], expected[here], atol=2e-4)
        done += len(taken)
    assert done == len(line.logprobs)
