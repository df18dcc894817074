"""Sampling by a real SGLang server: stop texts, temperature and truncation against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from needs import needs_engine
from tiny_model import CPU_ENGINE, make_model
from transformers import AutoModelForCausalLM

from megatron_async_rl.config import load as configuration
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.protocol.types import Segment
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.engine_process import SGLangServer
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.workflow import Completion

pytestmark = needs_engine
PROMPT = "1+2=3;4+5="
CONTEXT = 256  # as many as the model has positions
GREEDY = Sampling(60, 0.0, [0])


@dataclass
class Engine:
    runner: asyncio.Runner
    generator: Generator
    tokenizer: Tokenizer
    model: Any

    def generate(
        self, sampling: Sampling, num: int = 1, resumed: tuple[Segment, ...] = ()
    ) -> list[Completion]:
        async def all_of_them() -> list[Completion]:
            prompt = self.tokenizer.encode(PROMPT).tolist()
            calls = [self.generator.generate(prompt, sampling, resumed) for _ in range(num)]
            return list(await asyncio.gather(*calls))

        return self.runner.run(all_of_them())

    def text(self, completion: Completion) -> str:
        return self.tokenizer.decode_all(completion.ids)

    def logprobs(self, ids: list[int], temperature: float) -> np.ndarray:
        """[num_ids, vocab]: log softmax(logits / temperature) of transformers, after PROMPT."""
        prompt = self.tokenizer.encode(PROMPT).tolist()
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1).numpy()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "logs").mkdir()
    (folder / "keys").mkdir(mode=0o700)
    model = make_model(folder / "model")
    tree: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": 1},
        "model": {"path": str(model), "context_tokens": CONTEXT},
        "data": {"train": "unused"},
        "rollout": {"max_new_tokens": 60, "stop": ["any"]},
        "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        "sglang": CPU_ENGINE,
    }
    server = SGLangServer(configuration.from_tree(tree), folder, "rollout-0")
    tokenizer, gate = Tokenizer(model), Gate()
    gate.open()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    with asyncio.Runner() as runner:
        runner.run(server.start())
        runner.run(server.client.relabel(0))
        generator = Generator(
            server.client, gate, lambda: None, CONTEXT, tokenizer.vocab_size, tokenizer.decode_all
        )
        yield Engine(runner, generator, tokenizer, reference)
        runner.run(server.stop())


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> Completion:
    [completion] = engine.generate(GREEDY)
    assert len(completion.ids) > 12
    return completion


def test_stop_text_ends_the_response_and_its_tokens_are_kept(
    engine: Engine, greedy: Completion
) -> None:
    text = engine.text(greedy)
    stop = text[6:9]
    [stopped] = engine.generate(replace(GREEDY, stop=("none", stop)))
    assert stopped.stop == "stop"
    assert engine.text(stopped) == text[: text.index(stop) + len(stop)]
    assert stopped.ids == greedy.ids[: len(stopped.ids)]


def test_stop_text_across_an_interruption_ends_the_response(
    engine: Engine, greedy: Completion
) -> None:
    text = engine.text(greedy)
    stop = text[6:9]
    begun = text.index(stop) + 1  # one character of the stop text: the engine sees the other two
    resumed = Segment(3, greedy.ids[:begun], [-0.5] * begun)
    [stopped] = engine.generate(replace(GREEDY, stop=(stop,)), resumed=(resumed,))
    assert (stopped.stop, engine.text(stopped)) == ("stop", text[: begun + 2])
    assert [len(segment.ids) for segment in stopped.segments] == [begun, 2]


def test_context_is_filled_to_the_last_token(engine: Engine) -> None:
    """SGLang keeps the last 7 tokens of its own context free of input."""

    async def generate(room: int) -> tuple[int, Completion]:
        ids = [3 + n % 30 for n in range(CONTEXT - room)]
        return room, await engine.generator.generate(ids, Sampling(60, 1.0, [0]))

    async def all_of_them() -> list[tuple[int, Completion]]:
        return list(await asyncio.gather(*(generate(room) for room in [1, 2, 6, 7, 8, 20] * 3)))

    filled = set()
    for room, completion in engine.runner.run(all_of_them()):
        if completion.stop == "length":
            assert len(completion.ids) == room
            filled.add(room)
        else:
            assert completion.ids[-1] == 0 and len(completion.ids) <= room
    assert {1, 2} <= filled


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_transformers_at_the_temperature(
    engine: Engine, temperature: float
) -> None:
    for completion in engine.generate(Sampling(40, temperature, [0], stop=("+", "7")), 6):
        expected = engine.logprobs(completion.ids, temperature)
        said = [logprob for segment in completion.segments for logprob in segment.logprobs]
        chosen = expected[np.arange(len(said)), completion.ids]
        np.testing.assert_allclose(said, chosen, atol=1e-3)


@pytest.mark.parametrize(
    "truncation", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.4}], ids=lambda it: next(iter(it))
)
def test_truncated_sampling_returns_logprobs_of_all_tokens(
    engine: Engine, truncation: dict[str, Any]
) -> None:
    """So training refuses it: the tokens came from the renormalised distribution of a few."""
    renormalised_differs = 0.0
    for completion in engine.generate(Sampling(40, 0.8, [0], **truncation), 4):
        logprobs = engine.logprobs(completion.ids, 0.8)
        said = [logprob for segment in completion.segments for logprob in segment.logprobs]
        np.testing.assert_allclose(said, logprobs[np.arange(len(said)), completion.ids], atol=1e-3)
        for row, token in zip(np.exp(logprobs), completion.ids, strict=True):
            kept = kept_tokens(row, **truncation)
            assert token in kept
            renormalised_differs = max(renormalised_differs, float(-np.log(row[kept].sum())))
    assert renormalised_differs > 0.2


def kept_tokens(
    probabilities: np.ndarray, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> np.ndarray:
    """Returns the tokens that may be sampled, with those that rounding may add."""
    order = np.argsort(-probabilities)
    if top_k:
        return order[probabilities[order] >= probabilities[order[top_k - 1]] - 1e-4]
    if top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        return order[before <= top_p + 1e-4]
    return order[probabilities[order] >= min_p * probabilities.max() - 1e-4]


@pytest.mark.parametrize("start", [4, 20])
def test_logprobs_of_input_tokens_are_those_of_a_prefill(engine: Engine, start: int) -> None:
    """Temperature 1, the prefix cache and the vocabulary's last token included."""
    client = engine.generator._client
    prompt = engine.tokenizer.encode(PROMPT).tolist()
    ids = prompt + np.random.default_rng(0).integers(1, engine.tokenizer.vocab_size, 40).tolist()
    ids[30] = engine.tokenizer.vocab_size - 1  # SGLang reports it as 0
    for _ in range(2):  # the second time the prefix is cached
        version, logprobs = engine.runner.run(client.input_logprobs(ids, start))
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert version == 0
        np.testing.assert_allclose(logprobs, wanted.numpy()[start - 1 :], atol=1e-3)


def test_server_reports_what_leases_and_metrics_need(engine: Engine) -> None:
    load = engine.runner.run(engine.generator._client.load())
    assert set(load) == {
        "running_requests",
        "queued_requests",
        "kv_use_fraction",
        "kv_capacity_tokens",
        "cache_hit_fraction",
        "decode_tokens_per_s",
    }
    assert load["kv_capacity_tokens"] == CPU_ENGINE["max_total_tokens"]
    assert 0 <= load["kv_use_fraction"] <= 1 and load["queued_requests"] == 0
