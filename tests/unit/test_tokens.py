"""Which samples and partial samples are recorded: none that no server of the run can generate."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import pytest
from core_builders import (
    finish_lease,
    generated,
    join_workers,
    make_core,
    make_partial,
    make_sample,
    messages_of,
    restart_core,
)

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import ReportError
from megatron_async_rl.controller.journal import events
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    PartialSample,
    ScoreRequest,
    ScoreResult,
)
from megatron_async_rl.protocol.types import Partial, Sample

GOOD = make_sample(0, 0)
LIMITS = {"context_tokens": 8, "vocab_size": 64}


def with_values(name: str, *values: float) -> dict[str, np.ndarray]:
    """Replaces the last values of one array of GOOD."""
    array = np.array(getattr(GOOD, name))
    array[-len(values) :] = values
    return {name: array}


def long(length: int) -> dict[str, np.ndarray]:
    sample = make_sample(*[0] * (length - 3))
    return {"ids": sample.ids, "logprobs": sample.logprobs, "versions": sample.versions}


EMPTY = {
    "ids": np.empty(0, np.int32),
    "logprobs": np.empty(0, np.float32),
    "versions": np.empty(0, np.int32),
}
FAULTS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "empty arrays": (EMPTY, "0 ids, 0 logprobs, 0 versions"),
    "arrays of different lengths": ({"ids": GOOD.ids[:-1]}, "4 ids, 5 logprobs"),
    "a version below -1": (with_values("versions", -2), "a version of -2"),
    "only versions below -1": (with_values("versions", -2, -7), "a version of -7"),
    "a version of the future": (with_values("versions", 1), "versions 0 to 1, possible are 0 to 0"),
    "no generated token": (with_values("versions", -1, -1), "no token was generated"),
    "an id below 0": (with_values("ids", -1), "ids -1 to 3, the vocabulary has 64"),
    "an id outside the vocabulary": (with_values("ids", 64), "ids 0 to 64"),
    "another prompt": ({"ids": GOOD.ids[::-1].copy()}, "does not begin with prompt '0'"),
    "a longer prompt": (with_values("versions", -1, 0), "does not begin with prompt '0'"),
    "context after the response": (with_values("versions", 0, -1), "context after generated"),
    "more tokens than the context": (long(9), "9 tokens, model.context_tokens = 8"),
    "a positive logprob": (with_values("logprobs", 50), "a logprob of 50, above 0"),
    "an infinite logprob": (with_values("logprobs", -np.inf), "logprobs that are not finite"),
    "a logprob that is no number": (with_values("logprobs", np.nan), "not finite"),
    "ids that are no integers": ({"ids": GOOD.ids.astype(np.float32)}, "ids are float32"),
    "versions that are no integers": (
        {"versions": GOOD.versions.astype(np.float32)},
        "versions are float32",
    ),
}
each_fault = pytest.mark.parametrize(
    ("arrays", "fault"), FAULTS.values(), ids=[name.replace(" ", "-") for name in FAULTS]
)


def damaged_partial(arrays: dict[str, np.ndarray]) -> Partial:
    return msgspec.structs.replace(Partial(GOOD.ids, GOOD.logprobs, GOOD.versions), **arrays)


@each_fault
def test_sample_that_no_server_can_have_generated_is_refused_by_name(
    arrays: dict[str, np.ndarray], fault: str
) -> None:
    core = make_core(max_staleness=0, **LIMITS)
    lease, *_ = join_workers(core)
    core.state.take_events()
    reply = Generated(lease.key(0), msgspec.structs.replace(GOOD, **arrays))
    actions = core.handle(inputs.Received("rollout-0", reply), 1)
    [error] = [action.error for action in actions if isinstance(action, ReportError)]
    assert error.startswith(f"rollout-0: sample {lease.key(0)} is refused: ") and fault in error
    kinds = {type(event) for event in core.state.take_events()}
    assert kinds == {events.LeaseFailed, events.LeaseGranted}  # leased again, nothing returned
    assert core.num_fenced_messages == 1
    core.state.check()


@each_fault
def test_faulty_partial_sample_is_refused_before_it_is_recorded(
    arrays: dict[str, np.ndarray], fault: str
) -> None:
    core = make_core(max_staleness=0, **LIMITS)
    lease, *_ = join_workers(core)
    recorded = core.state.take_events()
    reply = PartialSample(lease.key(0), damaged_partial(arrays))
    [error] = core.handle(inputs.Received("rollout-0", reply), 1)
    assert isinstance(error, ReportError) and fault in error.error
    assert core.state.take_events() == [] and core.num_fenced_messages == 1
    # the failure after it leases the sample again, here and after a restart
    failed = GenerateFailed(lease.key(0), "the server died")
    [again] = messages_of(core.handle(inputs.Received("rollout-0", failed), 2), Generate)
    assert again.partials == [] and again.attempt == 2
    restarted = restart_core(core, recorded + core.state.take_events())
    assert len(join_workers(restarted)) == 2


@each_fault
def test_restore_skips_a_faulty_partial_of_the_journal(
    arrays: dict[str, np.ndarray], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(max_staleness=0, **LIMITS)
    lease, *_ = join_workers(core)
    recorded = core.state.take_events()
    recorded.append(events.PartialSaved(lease.group_id, 0, damaged_partial(arrays)))
    recorded.append(events.PartialSaved(lease.group_id, 1, make_partial(0)))
    with caplog.at_level(logging.ERROR):
        restarted = restart_core(core, recorded)
    [line] = caplog.messages
    assert line.startswith("the journal's partial sample 0.0 is skipped: ") and fault in line
    again, *_ = join_workers(restarted)
    assert again.group_id == 0 and again.partials[0] is None
    assert again.partials[1] is not None and again.partials[1].num_generated == 1


def test_samples_at_the_limits_are_accepted() -> None:
    limits = {"context_tokens": len(GOOD.ids), "vocab_size": int(GOOD.ids.max()) + 1}
    core = make_core(max_staleness=0, **limits)
    lease, *_ = join_workers(core)
    rounding = msgspec.structs.replace(GOOD, **with_values("logprobs", 1e-6))
    core.handle(inputs.Received("rollout-0", Generated(lease.key(0), rounding)), 1)
    assert core.state.groups[lease.group_id].missing == [1] and core.num_fenced_messages == 0


def of_versions(*versions: int) -> Sample:
    all_versions = np.asarray(versions, np.int32)
    zeros = np.zeros(len(versions), np.float32)
    return Sample(np.arange(len(versions), dtype=np.int32) + 7, zeros, all_versions, "stop", "1")


def test_samples_of_a_workflow_choose_their_context() -> None:
    core = make_core(max_staleness=0, single_turn=False, **LIMITS)
    lease, *_ = join_workers(core)
    turns = of_versions(-1, -1, 0, 0, -1, 0)
    partial = Partial(turns.ids[:4], turns.logprobs[:4], turns.versions[:4])
    for reply in (PartialSample(lease.key(0), partial), Generated(lease.key(0), turns)):
        core.handle(inputs.Received("rollout-0", reply), 1)
    assert core.state.groups[lease.group_id].missing == [1] and core.num_fenced_messages == 0
    # a partial sample is the input of one call and its tokens: they cannot alternate
    mixed = Partial(turns.ids, turns.logprobs, turns.versions)
    core.handle(inputs.Received("rollout-0", PartialSample(lease.key(1), mixed)), 1)
    assert core.num_fenced_messages == 1 and not core.state.groups[lease.group_id].partials


def test_versions_below_the_marker_do_not_hide_the_age_of_a_group() -> None:
    """Read as unsigned, -2 was newer than every version, so its group was never stale."""
    core = make_core(prompts_per_step=1, samples_per_prompt=1, max_staleness=0, **LIMITS)
    [lease] = join_workers(core)
    forged = msgspec.structs.replace(GOOD, **with_values("versions", -2))
    core.handle(inputs.Received("rollout-0", Generated(lease.key(0), forged)), 0)
    group = core.state.groups[lease.group_id]
    assert group.samples == [None] and group.oldest_version == 0


@pytest.mark.parametrize("reward", [1e10, -1e300, float("inf"), float("nan")])
def test_reward_that_would_overflow_is_an_infrastructure_error(reward: float) -> None:
    core = make_core(max_staleness=0)
    lease, *_ = join_workers(core)
    [score] = messages_of(
        core.handle(inputs.Received("rollout-0", generated(lease, 0, 0)), 0), ScoreRequest
    )
    actions = core.handle(inputs.Received("reward-0", ScoreResult(score.key, reward)), 0)
    assert messages_of(actions, ScoreRequest) == [score]  # scored again
    assert core.state.groups[lease.group_id].rewards == [None, None]


def test_duplicate_workflow_request_leaves_no_load_behind() -> None:
    core = make_core(max_staleness=0)
    lease, *_ = join_workers(core)
    request = ScoreRequest(lease.key(0), "1", call=1)
    for _ in range(3):
        core.handle(inputs.Received("rollout-0", request), 0)
    assert core.fleet.reward["reward-0"].load == 1
    core.handle(inputs.Received("reward-0", ScoreResult(lease.key(0), 1.0, call=1)), 0)
    assert core.fleet.reward["reward-0"].load == 0
    finish_lease(core, lease, 0)
    assert core.fleet.reward["reward-0"].load == 0
