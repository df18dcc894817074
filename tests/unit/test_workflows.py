"""The workflows that ship: their turns, contexts and rewards, token by token."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from chat_model import END, START, Script, make_chat_tokenizer
from config_builders import config_tree
from core_builders import join_workers, make_core, make_sample, messages_of, scored

from megatron_async_rl import hooks
from megatron_async_rl.config import load
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.controller.core import inputs
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import ConfigError, DataError
from megatron_async_rl.protocol import rules
from megatron_async_rl.protocol.messages import Generated, Hello, ScoreRequest
from megatron_async_rl.protocol.types import NOT_GENERATED, Prompt, Sample
from megatron_async_rl.rollout import tool_calls
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.policy import plain_ids
from megatron_async_rl.rollout.python_runner import PythonRunner, shortened
from megatron_async_rl.rollout.tool_calls import BadCall, ToolCall
from megatron_async_rl.rollout.worker import blocked_reason, sleep_late
from megatron_async_rl.rollout.workflow import Episode, Policy
from megatron_async_rl.rollout.workflows.multi_turn_math import FEEDBACK, MultiTurnMath
from megatron_async_rl.rollout.workflows.python_tool import find_calls

CHAT = {"data.chat_template": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_chat_tokenizer(tmp_path_factory.mktemp("model") / "chat")


def texts_of_turns(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode_all(sample.ids[a:b].tolist()) for a, b in sample.turns()]


def assert_inputs_continue_the_sample(script: Script, sample: Sample) -> None:
    """Each call's input is a prefix of the sample: nothing sampled was tokenized again."""
    for ids in script.inputs:
        assert sample.ids[: len(ids)].tolist() == ids


def test_wrong_answers_get_feedback_in_the_chat_template(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, [f"5{END}", f"7{END}", f"4{END}", "unused"], {"4": 1.0}, CHAT)
    sample = script.run(MultiTurnMath(max_turns=4, discount=0.9), "2+2?")
    chat = [{"role": "user", "content": "2+2?"}]
    for answer in ("5", "7"):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": FEEDBACK}]
    expected = tokenizer.render_chat(chat) + f"4{END}"
    assert tokenizer.decode_all(sample.ids.tolist()) == expected
    assert texts_of_turns(sample, tokenizer) == [f"5{END}", f"7{END}", f"4{END}"]
    assert (sample.text, sample.stop, sample.discount) == ("4", "stop", pytest.approx(0.81))
    assert [version for version, _ in sample.version_runs()] == [1, 2, 3]
    assert script.scored == ["5", "7", "4"] and sample.metrics == {"turns": 3}
    assert_inputs_continue_the_sample(script, sample)


def test_right_answer_ends_the_sample_without_discount(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, [f"4{END}"], {"4": 1.0}, CHAT)
    sample = script.run(MultiTurnMath(), "2+2?")
    assert (sample.text, sample.discount, len(sample.turns())) == ("4", 1.0, 1)


def test_last_turn_is_scored_only_as_the_finished_sample(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, [f"5{END}", f"6{END}"], {}, CHAT)
    sample = script.run(MultiTurnMath(max_turns=2, discount=0.5), "2+2?")
    assert (sample.text, sample.discount, script.scored) == ("6", 0.5, ["5"])


def test_turn_that_is_cut_off_gets_no_feedback(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, ["55555555"], {}, CHAT)
    sample = script.run(MultiTurnMath(), "2+2?", max_new_tokens=3)
    assert (sample.text, sample.stop, script.scored) == ("555", "length", [])


def test_sample_ends_where_the_feedback_leaves_no_room(tokenizer: Tokenizer) -> None:
    settings = CHAT | {"model.context_tokens": 100, "rollout.max_new_tokens": 10}
    script = Script(tokenizer, [f"5{END}", "unused"], {}, settings)
    sample = script.run(MultiTurnMath(feedback="x" * 200), "2+2?")
    assert (sample.text, sample.stop, len(sample.turns())) == ("5", "length", 1)
    assert sample.ids.tolist() == [*script.inputs[0], *tokenizer.encode(f"5{END}")]


def test_text_prompt_gets_the_feedback_alone(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, [f"5{END}", f"4{END}"], {"4": 1.0})
    sample = script.run(MultiTurnMath(feedback=" No. {prompt}"), "2+2=")
    assert tokenizer.decode_all(sample.ids.tolist()) == f"2+2=5{END} No. 2+2=4{END}"


def test_context_ends_a_turn_that_a_stop_text_ended(tokenizer: Tokenizer) -> None:
    settings = CHAT | {"rollout.stop": ["</a>"]}
    script = Script(tokenizer, ["<a>5</a>", f"4{END}"], {"4": 1.0}, settings)
    sample = script.run(MultiTurnMath(feedback="No."), "2+2?")
    assert f"<a>5</a>{END}\n{START}user\nNo." in tokenizer.decode_all(sample.ids.tolist())
    assert texts_of_turns(sample, tokenizer)[0] == "<a>5</a>"


def test_tool_prompt_and_tool_message_follow_the_template(tokenizer: Tokenizer) -> None:
    config = load.from_tree(
        {
            "run": {"dir": "runs/a", "steps": 1},
            "model": {"path": "m", "context_tokens": 128},
            "data": {"train": "t", "chat_template_kwargs": {"enable_thinking": False}},
            "rollout": {"max_new_tokens": 8, "workflow": "python_tool"},
            "algorithm": {"prompts_per_step": 1, "samples_per_prompt": 2},
        }
    )
    from megatron_async_rl.data.chat_template import template_variables

    variables = template_variables(config)
    assert variables["enable_thinking"] is False
    chat = tokenizer.render_chat([{"role": "user", "content": "?"}], variables=variables)
    assert '"name": "python"' in chat
    after = tokenizer.render_next_turn([{"role": "tool", "content": "42"}], variables=variables)
    assert after == (
        f"{END}\n{START}user\n<tool_response>\n42\n</tool_response>{END}\n{START}assistant\n"
    )


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("the answer is 4", []),
        (
            'let me see <tool_call>\n{"name": "python", "arguments": {"code": "print(1)"}}\n'
            '</tool_call>\n<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"2\\"}"}'
            "</tool_call>",
            ["print(1)", "2"],
        ),
        ("so\n```python\nprint(3)\n```\n", ["print(3)\n"]),
        ("```python\nprint(3)\n```\nprints 3", []),  # not a call: the answer goes on
        ("```python\nprint(3)\n```\nso\n```python\nprint(4)\n```", ["print(4)\n"]),
        ("```python\nprint(3)\n```\nprints\n```\n3\n```", []),
        ("```text\n3\n```", []),
        ('<tool_call>{"name": "python", "arguments": {"code": "a', []),  # cut off
    ],
)
def test_calls_are_found_in_the_response(text: str, codes: list[str]) -> None:
    programs = [c.arguments["code"] if isinstance(c, ToolCall) else c for c in find_calls(text)]
    assert programs == codes


@pytest.mark.parametrize("text", ["<tool_call>", "a```py\n", "```python\n", "```"])
def test_repeated_beginning_of_a_call_takes_no_time(text: str) -> None:
    """A policy may repeat one token up to the limit; all samples of the worker would wait."""
    started = time.process_time()
    find_calls(text * 32_768)
    find_calls(f"{text * 32_768}```")
    tool_calls.split(text * 32_768)
    assert time.process_time() - started < 1.5  # the garbage collector may run meanwhile


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("print(1)", "a call is JSON of the form"),
        ("[1]", "a call is JSON of the form"),
        ('{"name": "python"}', "`code` must be a text, it is a NoneType"),
        ('{"name": "python", "arguments": [1]}', "a call is JSON of the form"),
        ("[" * 100_000, "a call is JSON of the form"),
        ('{"name": "search", "arguments": {"code": "1"}}', "no tool 'search'"),
        ('{"name": "python", "arguments": {"code": 1}}', "`code` must be a text"),
    ],
)
def test_call_that_cannot_be_read_is_an_error_message_to_the_policy(call: str, error: str) -> None:
    [found] = find_calls(f"<tool_call>{call}</tool_call>")
    if isinstance(found, ToolCall):
        assert error in asyncio.run(PythonRunner(SandboxConfig()).answer(found))
    else:
        assert isinstance(found, BadCall) and error in found.error


def test_long_output_is_shortened_in_its_middle() -> None:
    assert shortened("x" * 100, 100) == "x" * 100
    text = shortened("a" * 300 + "b" * 300, 100)
    assert text.startswith("a" * 50 + "\n") and text.endswith("\n" + "b" * 50)
    assert "500 characters left out" in text


@pytest.mark.parametrize(
    ("workflow", "options", "problem"),
    [
        ("single_turn", {"max_turns": 2}, "the options of single_turn are none"),
        ("multi_turn_math", {"turns": 2}, "max_turns, discount, feedback, success"),
        ("multi_turn_math", {"max_turns": 0}, "workflow_options.max_turns = 0"),
        ("multi_turn_math", {"discount": 1.5}, "workflow_options.discount = 1.5"),
        ("multi_turn_math", {"feedback": ""}, "workflow_options.feedback = ''"),
        ("python_tool", {"processes": "4"}, "workflow_options.processes = '4'"),
    ],
)
def test_wrong_option_is_refused_by_its_name(
    workflow: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        hooks.workflow(workflow, options)
    assert problem in str(refused.value) and "\n" not in str(refused.value)


# ---- the discount in the controller


def test_reward_in_training_is_the_score_times_the_discount() -> None:
    core = make_core(single_turn=False)
    lease, *_ = join_workers(core)
    sample = msgspec.structs.replace(make_sample(0), discount=0.25)
    actions = core.handle(inputs.Received("rollout-0", Generated(lease.key(0), sample)), 0)
    [request] = messages_of(actions, ScoreRequest)
    core.handle(inputs.Received("reward-0", scored(request, 0.5)), 0)
    assert core.state.groups[lease.group_id].rewards[0] == 0.125


@pytest.mark.parametrize("discount", [-0.1, 1.5, float("nan"), float("inf")])
def test_worker_may_not_raise_a_reward(discount: float) -> None:
    sample = msgspec.structs.replace(make_sample(0), discount=discount)
    core = make_core()
    lease, *_ = join_workers(core)
    hello = Hello("rollout", "rollout-0", 1)
    limits = rules.Limits(version=0, steps=1, num_leaders=1, num_stages=1)
    assert "discount" in rules.problem(Generated(lease.key(0), sample), hello, limits)
    assert not rules.problem(Generated(lease.key(0), make_sample(0)), hello, limits)


def test_context_is_never_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    script = Script(tokenizer, [f"5{END}", f"6{END}"], {}, CHAT)
    sample = script.run(MultiTurnMath(max_turns=2), "2+2?")
    trained = np.flatnonzero(sample.versions != NOT_GENERATED)
    assert tokenizer.decode_all(sample.ids[trained].tolist()) == f"5{END}6{END}"
    assert not sample.logprobs[sample.versions == NOT_GENERATED].any()


def test_workflow_that_blocks_its_worker_is_noticed() -> None:
    async def late() -> float:
        sleeping = asyncio.create_task(sleep_late(0.01))
        await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251 as a workflow that does not await
        return await sleeping

    assert asyncio.run(late()) > 0.1


def test_only_a_workflow_of_ones_own_is_named_as_what_blocks_its_worker() -> None:
    named = load.from_tree(config_tree(**{"rollout.workflow": "my:Flow"}))
    assert blocked_reason(named) == (
        "if rollout.workflow = my:Flow waits or computes so long, it must use asyncio.to_thread"
    )
    agent = load.from_tree(config_tree(**{"rollout.agent": "my:solve"}))
    assert "CPU cores" in blocked_reason(load.from_tree(config_tree())) == blocked_reason(agent)


class Changes:
    """Samples one turn, with other sampling or a changed token."""

    def __init__(self, token: int | None = None, **sampling: Any) -> None:
        self._token, self._sampling = token, sampling

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        episode = Episode(prompt.ids)
        turn = await policy.generate(episode.ids, replace(sampling, **self._sampling))
        episode.add_turn(turn)
        if self._token is not None:
            episode.ids[-1] = self._token
        return episode.sample(turn.stop, "text")


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("top_p", 0.9), ("top_k", 4)])
def test_workflow_cannot_sample_from_another_distribution(
    tokenizer: Tokenizer, name: str, value: float
) -> None:
    script = Script(tokenizer, ["one"])
    with pytest.raises(DataError, match=rf"sampling\.{name} = {value}, .* rollout\.{name} = "):
        script.run(Changes(**{name: value}), "q")
    assert script.run(Changes(max_new_tokens=2), "q").num_generated == 2


def test_stop_text_of_a_workflow_needs_a_server_that_reads_text(tokenizer: Tokenizer) -> None:
    script = Script(tokenizer, ["one", "two"])
    with pytest.raises(DataError, match=r"sampling\.stop = \('n',\), .*; set rollout\.stop"):
        script.run(Changes(stop=("n",)), "q")
    script.settings["rollout.stop"] = ["x"]
    assert script.run(Changes(stop=("n",)), "q").stop == "stop"


def test_workflow_cannot_change_a_sampled_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"begins at episode\.ids\[\d+\] has other .* sampled; change"
    ):
        Script(tokenizer, ["one"]).run(Changes(token=7), "q")


def test_token_ids_may_be_an_array_but_no_text() -> None:
    ids = plain_ids(np.array([3, 4], np.int32))
    assert ids == [3, 4] and {type(token) for token in ids} == {int}
    with pytest.raises(DataError, match=r"got a str, must be token ids; .*tokenizer\.encode"):
        plain_ids("3")
