"""Permitted senders of each message, and the ranges of its fields."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import numpy as np
import pytest
from core_builders import make_partial, make_sample

from megatron_async_rl.protocol import messages as m
from megatron_async_rl.protocol import rules
from megatron_async_rl.protocol import weight_messages as wm
from megatron_async_rl.protocol.rules import FIELDS, RULES, Limits, hello_problem, problem
from megatron_async_rl.protocol.types import FileEntry, SampleKey
from megatron_async_rl.protocol.wire import AnyMessage

LIMITS = Limits(version=4, steps=9, num_leaders=2, num_stages=2)
ROLLOUT, REWARD = m.Hello("rollout", "rollout-0", 1), m.Hello("reward", "reward-0", 1)
FIRST = m.Hello("trainer", "trainer-0", 1, leader=0, stage=0)
LEADER = m.Hello("trainer", "trainer-2", 1, leader=1)
SOURCE = m.Hello("trainer", "trainer-1", 1, stage=1)
KEY = SampleKey(1, 2, 3, 0)
BUCKET = wm.Bucket([wm.TensorSpec("model.embed_tokens.weight", "bfloat16", [8, 4])])
FILE = FileEntry("model-00001-00000.safetensors", 8, "ab12", ["lm_head.weight"])
STATS = {
    "train/loss": -0.5,
    "train/tokens": 9.0,
    "perf/time/proximal_s": 0.1,
    "perf/time/train_s": 0.5,
    "train/lr": 1e-6,
}

ALLOWED: list[tuple[m.Message, list[m.Hello]]] = [
    (m.Heartbeat(1, 5), [ROLLOUT, REWARD, FIRST, LEADER, SOURCE]),
    (m.Failed("the server died\nTraceback ..."), [ROLLOUT, REWARD]),
    (m.Generated(KEY, make_sample(0)), [ROLLOUT]),
    (m.PartialSample(KEY, make_partial(0)), [ROLLOUT]),
    (m.GenerateFailed(KEY, "no"), [ROLLOUT]),
    (m.ScoreRequest(KEY, "1\0", call=1), [ROLLOUT]),
    (m.ScoreResult(KEY, 1.0, seconds=0.1), [REWARD]),
    (m.GetBatch(4), [FIRST, LEADER]),
    (m.StepDone(5, STATS), [FIRST]),
    (m.ProbeResult(4, np.array([-0.5, np.nan], np.float32)), [ROLLOUT]),
    (m.CheckpointSaved(4, "v000004"), [FIRST]),
    (wm.PublishOffer(4, 0, 2, [BUCKET], "gloo"), [FIRST, SOURCE]),
    (wm.GroupOpened("weights-1000001-source0", 0, "10.0.0.1", 29500), [FIRST, SOURCE]),
    (wm.GroupJoined("weights-1000001-source0", "no"), [ROLLOUT, FIRST, SOURCE]),
    (wm.BucketsSent(4, 1, {"0:model.norm.weight": "ab12"}, {"send": 0.1}), [FIRST, SOURCE]),
    (wm.SnapshotWritten(4, [FILE], {}, "tiles", {"write": 0.1}), [FIRST, SOURCE]),
    (wm.UpdateReady(4, {"interrupt": 0.1}), [ROLLOUT]),
    (wm.Updated(4, {"pause": 0.1}, num_interrupted=3), [ROLLOUT]),
]
SENDERS = [ROLLOUT, REWARD, FIRST, LEADER, SOURCE]


def test_table_covers_each_message_and_field_that_a_worker_sends() -> None:
    assert [type(message) for message, _ in ALLOWED] == list(RULES)
    for message, _ in ALLOWED:
        pending: list[type] = [type(message)]
        while pending:
            kind = pending.pop()
            hints = typing.get_type_hints(kind)
            for field in msgspec.structs.fields(kind):
                nested = [
                    part
                    for part in (hints[field.name], *typing.get_args(hints[field.name]))
                    if isinstance(part, type) and issubclass(part, msgspec.Struct)
                ]
                pending += nested
                assert field.name in FIELDS or hints[field.name] in nested, (kind, field.name)


@pytest.mark.parametrize(
    ("message", "allowed"), ALLOWED, ids=[type(message).__name__ for message, _ in ALLOWED]
)
def test_each_message_passes_from_its_senders_only(
    message: m.Message, allowed: list[m.Hello]
) -> None:
    for hello in SENDERS:
        found = problem(message, hello, LIMITS)
        if hello in allowed:
            assert found == ""
        else:
            assert found.startswith(f"{type(message).__name__}, which only a ")


def test_messages_of_the_controller_are_for_no_worker_to_send() -> None:
    others = set(typing.get_args(AnyMessage)) - set(RULES) - {m.Hello}
    assert {m.Welcome, m.TrainBatch, m.Generate, m.Shutdown, wm.Published} <= others
    for hello in SENDERS:
        assert problem(m.Shutdown("x"), hello, LIMITS) == "Shutdown, which no worker may send"
        assert problem(m.Welcome(1), hello, LIMITS) == "Welcome, which no worker may send"


WRONG: list[tuple[m.Message, m.Hello, str]] = [
    (m.GetBatch(-1), FIRST, "GetBatch with version = -1"),
    (m.Heartbeat(-1), ROLLOUT, "running = -1"),
    (m.Heartbeat(idle_s=float("nan")), ROLLOUT, "idle_s = nan"),
    (m.Heartbeat(engine={"queued_requests": float("inf")}), ROLLOUT, "engine"),
    (m.Heartbeat(0, 1 << 60), ROLLOUT, "tokens_generated"),
    (m.GenerateFailed(SampleKey(-1, 0, 0, 0), ""), ROLLOUT, "epoch = -1"),
    (m.ScoreRequest(KEY, "1"), ROLLOUT, "call = 0"),
    (m.ScoreRequest(KEY, "1", {"answer": "1"}, 1), ROLLOUT, "a row"),
    (m.ScoreRequest(KEY, "1", call=1, text_ends=[1]), ROLLOUT, "text_ends"),
    (m.ScoreResult(KEY, 1.0, seconds=float("nan")), REWARD, "seconds = nan"),
    (m.ScoreResult(KEY, 1.0, metrics={"x": float("inf")}), REWARD, "metrics"),
    (m.ScoreResult(KEY, 1.0, metrics={"a/b": 1.0}), REWARD, "metrics"),
    (m.ScoreResult(KEY, 1.0, metrics={f"m{n}": 1.0 for n in range(33)}), REWARD, "metrics"),
    (m.StepDone(0, {}), FIRST, "version = 0"),
    (m.StepDone(5, {"loss": 1.0}), FIRST, "stats"),
    (m.StepDone(5, {"train/\0": 1.0}), FIRST, "stats"),
    (m.StepDone(5, {f"train/{n}": 1.0 for n in range(2000)}), FIRST, "stats"),
    (m.StepDone(5, {"train/tokens": 9.0}), FIRST, "train/tokens"),
    (m.StepDone(5, {"train/tokens": 9.0, "perf/time/train_s": 0.0}), FIRST, "train/tokens"),
    (m.ProbeResult(4, np.array([1], np.int32)), ROLLOUT, "probe_logprobs"),
    (m.ProbeResult(4, np.zeros(1 << 21, np.float32)), ROLLOUT, "probe_logprobs"),
    (m.CheckpointSaved(4, "v000004\0"), FIRST, r"folder = 'v000004\x00', must be v000004"),
    (m.CheckpointSaved(4, "../../etc"), FIRST, "folder = '../../etc'"),
    (m.CheckpointSaved(6, "v000006"), FIRST, "version = 6, the newest is 5"),
    (wm.PublishOffer(6, 0, 1, [], "gloo"), FIRST, "version = 6, the newest is 5"),
    (wm.PublishOffer(6, 0, 1, [], "gloo"), SOURCE, "version = 6, the newest is 5"),
    (wm.PublishOffer(4, 1, 1, [], "gloo"), SOURCE, "source = 1 of 1"),
    (wm.PublishOffer(4, 0, 0, [], "gloo"), SOURCE, "num_sources = 0"),
    (
        wm.PublishOffer(4, 0, 1, [wm.Bucket([wm.TensorSpec("w", "O", [1])])], "gloo"),
        FIRST,
        "buckets",
    ),
    (wm.PublishOffer(4, 0, 1, [wm.Bucket([wm.TensorSpec("", "float32", [])])], "gloo"), FIRST, "b"),
    (
        wm.PublishOffer(4, 0, 1, [wm.Bucket([wm.TensorSpec("w", "float32", [-1])])], "gloo"),
        FIRST,
        "buckets",
    ),
    (wm.GroupOpened("a b", 0, "10.0.0.1", 1), SOURCE, "group = 'a b'"),
    (wm.GroupOpened("a", 0, "10.0.0.1", 65536), SOURCE, "port = 65536"),
    (wm.GroupOpened("a", 0, "\0", 1), SOURCE, "address"),
    (wm.BucketsSent(4, 0, {"w": ""}, {}), SOURCE, "digests"),
    (wm.BucketsSent(4, 0, {}, {"a/b": 1.0}), SOURCE, "seconds"),
    (wm.BucketsSent(4, 0, {}, {"a": -1.0}), SOURCE, "seconds"),
    (
        wm.SnapshotWritten(4, [FileEntry("../x.safetensors", 1, "ab", [])], {}, "tiles", {}),
        SOURCE,
        "files",
    ),
    (wm.Updated(-1, {}), ROLLOUT, "version = -1"),
    (wm.Updated(1, {}, num_interrupted=-1), ROLLOUT, "num_interrupted = -1"),
]


@pytest.mark.parametrize(("message", "hello", "expected"), WRONG)
def test_field_out_of_its_range_is_named(message: m.Message, hello: m.Hello, expected: str) -> None:
    found = problem(message, hello, LIMITS)
    assert found.startswith(f"{type(message).__name__} with ") and expected in found
    assert found.isprintable() and len(found) < 400


def test_offer_may_come_before_the_report_of_the_step() -> None:
    """Another rank sent it, or the connection lost the report."""
    offer = wm.PublishOffer(LIMITS.version + 1, 1, 2, [], "gloo")
    assert problem(offer, SOURCE, LIMITS) == ""
    assert problem(offer, FIRST, LIMITS) == ""
    assert problem(wm.PublishOffer(LIMITS.version, 0, 1, [], "gloo"), FIRST, limits(steps=2)) == ""
    at_the_end = limits(version=LIMITS.steps)
    assert problem(wm.PublishOffer(LIMITS.steps + 1, 1, 2, [], "gloo"), SOURCE, at_the_end) != ""


def limits(**changes: int) -> Limits:
    standard = {"version": 4, "steps": 9, "num_leaders": 2, "num_stages": 2}
    return Limits(**(standard | changes))


@pytest.mark.parametrize("hello", SENDERS, ids=lambda hello: hello.name)
def test_hello_of_each_kind_of_worker_is_accepted(hello: m.Hello) -> None:
    assert hello_problem(hello, LIMITS) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "rollout-1"}, {"name": "reward-1\n"}, {"name": "reward"}, {"name": "reward-x"},
        {"name": "reward-" + "1" * 60}, {"name": ""}, {"name": "Reward-1"},
        {"name": "reward-\u0661"},
        {"pid": 0}, {"pid": -9}, {"capacity": -1}, {"capacity": 1 << 40}, {"leader": 0},
        {"stage": 0}, {"serving": -2},
    ],
)  # fmt: skip
def test_hello_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    found = hello_problem(msgspec.structs.replace(REWARD, **changes), LIMITS)
    assert found.startswith("Hello ") and found.isprintable()


@pytest.mark.parametrize("changes", [{"leader": 2}, {"stage": 2}, {"leader": -2}, {"stage": -2}])
def test_trainer_outside_the_configured_layout_is_refused(changes: dict[str, int]) -> None:
    assert hello_problem(msgspec.structs.replace(FIRST, **changes), LIMITS) != ""


def test_text_of_a_worker_fits_into_one_log_line() -> None:
    assert rules.printable("a\nb\x1b[31m" + "x" * 500).startswith("a?b?[31mxxx")
    assert len(rules.printable("x" * 500)) == 200
    assert rules.shown(np.float32(1)).isprintable()
