"""Thinking is no answer, whether the response or the prompt's template opens it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from core_builders import core_settings, generated, join_workers, messages_of, prompt_stream
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megatron_async_rl.config.sections import RewardConfig, SandboxConfig
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.data import thinking
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.protocol.messages import ScoreRequest
from megatron_async_rl.protocol.types import SampleKey
from megatron_async_rl.reward.worker import RewardWorker

TAGS = ("<think>", "</think>", "[T]", "[/T]")


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>", "<think>"),
        ("assistant: [T] ", "[T]"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("Think between <think> and </think>.\nassistant\n", ""),
        ("Begin with <think>.", ""),
        ("", ""),
    ],
)
def test_opening_tag_at_the_end_of_a_prompt_is_found(prompt: str, tag: str) -> None:
    assert thinking.opened_by(prompt, TAGS) == tag
    assert thinking.opened_by(prompt, ()) == ""


@pytest.mark.parametrize(
    ("response", "rest"),
    [
        ("5", "5"),
        ("<think>4</think>5", "5"),
        ("4</think>5", "5"),
        ("<think>4</think><think>3</think>5", "5"),
        ("<think>[T]4[/T]</think>5", "5"),
        ("<think>4</think>[T]3[/T]5", "5"),
        ("<think>5", ""),
        ("4</think>5<think>6", ""),
        ("<think>4</think>[T]5", ""),
    ],
)
def test_only_what_follows_the_thinking_counts(response: str, rest: str) -> None:
    assert thinking.after_thinking(response, TAGS) == rest


@pytest.mark.parametrize(
    ("response", "opened", "reward"),
    [
        (r"so \boxed{5}</think>\boxed{6}", True, 0.0),
        (r"so \boxed{6}</think>\boxed{5}", True, 1.0),
        (r"so \boxed{5}", True, 0.0),
        (r"so \boxed{5}", False, 1.0),
        ("The answer is 5.", True, 0.0),
        (r"<think>6</think>\boxed{5}", True, 1.0),
        (r"<think>6</think>\boxed{5}", False, 1.0),
        ("", True, 0.0),
    ],
)
def test_thinking_that_the_prompt_opens_is_no_answer(
    response: str, opened: bool, reward: float
) -> None:
    worker = RewardWorker(RewardConfig(function="math"), SandboxConfig())
    tag = "<think>" if opened else ""
    request = ScoreRequest(SampleKey(1, 2, 3, 4), response, {"answer": "5"}, opening_tag=tag)
    scored = worker.score_inline(request)
    assert scored is not None and scored.reward == reward


def test_tags_that_are_special_tokens_stay_in_the_text(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "[T]", "[/T]", "five", "six"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "[T]", "[/T]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    ids = [2, 4, 4, 3, 5, 1]
    assert Tokenizer(tmp_path).decode(ids) == "five five six"
    assert Tokenizer(tmp_path, TAGS).decode(ids) == "[T]five five[/T]six"
    assert Tokenizer(tmp_path, TAGS).decode([4, 5]) == "five six"


def test_score_requests_carry_the_prompts_opening_tag() -> None:
    stream = prompt_stream()
    core = Core(core_settings(), lambda: msgspec.structs.replace(stream(), opening_tag="<think>"))
    core.admitting = True
    [lease, *_] = join_workers(core)
    asked = ScoreRequest(lease.key(0), "5</think>", call=1)
    events = [inputs.Received("rollout-0", one) for one in (asked, generated(lease, 1, 0))]
    sent = [action for event in events for action in core.handle(event, 1)]
    requests = messages_of(sent, ScoreRequest)
    assert [request.opening_tag for request in requests] == ["<think>", "<think>"]
