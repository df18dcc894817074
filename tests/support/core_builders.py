"""Builders for tests of the controller's core: a core, the replies to its messages, a restart."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import Action, Send
from megatron_async_rl.controller.core.core import Core
from megatron_async_rl.controller.core.groups import EvaluationTask
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.journal.events import JournalEvent
from megatron_async_rl.protocol.messages import Generate, Generated, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import NOT_GENERATED, Partial, Prompt, Sample

LEASE_S, SILENCE_S, STRAGGLER_S = 100.0, 60.0, 20.0


def core_settings(**changes: object) -> CoreSettings:
    standard: dict[str, object] = {
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_staleness": 1,
        "wait_for_stragglers": True,
        "straggler_timeout_s": STRAGGLER_S,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "lease_timeout_s": LEASE_S,
        "max_attempts": 3,
        "max_scoring_attempts": 2,
        "heartbeat_timeout_s": SILENCE_S,
        "steps": 1000,
        "data_parallel_size": 1,
    }
    return CoreSettings(**(standard | changes))  # type: ignore[arg-type]


def prompt_stream() -> Callable[[], Prompt]:
    """Returns a stream of prompts of three tokens, numbered from 0."""
    numbers = itertools.count()
    return lambda: Prompt(str(next(numbers)), np.arange(3, dtype=np.int32), {"answer": "1"})


def evaluation_tasks(count: int) -> list[EvaluationTask]:
    """Returns one sample of each of `count` prompts of a set named `held_out`."""
    stream = prompt_stream()
    return [EvaluationTask("held_out", stream(), 0, 8, 0.0) for _ in range(count)]


def make_core(**changes: object) -> Core:
    core = Core(core_settings(**changes), prompt_stream())
    core.admitting = True
    return core


def make_sample(*versions: int) -> Sample:
    """Returns a sample of three prompt tokens and one generated token of each version."""
    all_versions = np.asarray([NOT_GENERATED] * 3 + list(versions), np.int32)
    zeros = np.zeros(len(all_versions), np.float32)
    return Sample(
        ids=np.arange(len(all_versions), dtype=np.int32),
        logprobs=zeros,
        versions=all_versions,
        stop="stop",
        text="1",
    )


def messages_of(actions: list[Action], kind: type) -> list:
    """Returns the messages of this class that the actions send."""
    return [
        action.message
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, kind)
    ]


def generated(lease: Generate, index: int, *versions: int) -> Generated:
    return Generated(lease.key(index), make_sample(*versions))


def scored(score: ScoreRequest, reward: float | None = 1.0) -> ScoreResult:
    return ScoreResult(score.key, reward)


def join_workers(
    core: Core, capacity: int = 100, name: str = "rollout-0", version: int = 0
) -> list[Generate]:
    """Joins a reward worker and a server; returns the leases that the server gets."""
    core.handle(inputs.RewardJoined("reward-0", 100), 0)
    core.handle(inputs.RolloutJoined(name, capacity), 0)
    return messages_of(core.handle(inputs.ServerUpdated(name, version=version), 0), Generate)


def finish_lease(
    core: Core, lease: Generate, version: int, now: float = 0, worker: str = "rollout-0"
) -> list[Action]:
    """Returns all samples of a lease, and a reward of 1 for each."""
    actions: list[Action] = []
    for index in lease.indices:
        for score in messages_of(
            core.handle(inputs.Received(worker, generated(lease, index, version)), now),
            ScoreRequest,
        ):
            actions += core.handle(inputs.Received("reward-0", scored(score)), now)
    return actions


def restart_core(core: Core, events: list[JournalEvent]) -> Core:
    """Returns the core of the next epoch: same dataset, restored from the events on disk."""
    restarted = Core(core.settings, prompt_stream())
    restarted.restore(events)
    restarted.admitting = True
    return restarted


def make_partial(*versions: int) -> Partial:
    whole = make_sample(*versions)
    return Partial(whole.ids, whole.logprobs, whole.versions)
