"""Simulated runs with faults in which evaluations run beside training (simulation.py)."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from simulation import Server, SimulatedRun, expect

from megatron_async_rl.controller.core import inputs
from megatron_async_rl.controller.core.actions import (
    Action,
    FinishEvaluation,
    ReportEvaluated,
    SendBatch,
)
from megatron_async_rl.controller.core.fleet import ServerState
from megatron_async_rl.controller.core.groups import EvaluationTask
from megatron_async_rl.protocol.types import Prompt

NUM_SEEDS = 60
NUM_SAMPLES = 12
PROMPT = Prompt("held out", np.arange(2, dtype=np.int32), {})


class EvaluatedRun(SimulatedRun):
    """Requests an evaluation whenever none runs; gives up one that has lost its server."""

    def __init__(self, seed: int, mode: Literal["held_server", "mixed"]) -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()
        super().__init__(seed)

    def act(self, actions: list[Action]) -> None:
        super().act(actions)
        evaluation = self.core.evaluation
        for action in actions:
            if isinstance(action, ReportEvaluated) and action.sample is not None:
                self.counts["samples"] += 1
                labels = set(action.sample.versions[action.sample.generated].tolist())
                if self.mode == "held_server":
                    expect(labels == {evaluation.version}, f"labels {labels}")
            elif isinstance(action, FinishEvaluation):
                self.counts["abandoned" if action.abandoned else "complete"] += 1
            elif isinstance(action, SendBatch) and evaluation.mode:
                self.counts["batches"] += 1

    def tick(self) -> None:
        super().tick()
        evaluation = self.core.evaluation
        if evaluation.mode is None:
            tasks = [EvaluationTask("held_out", PROMPT, i, 8, 0.0) for i in range(NUM_SAMPLES)]
            request = inputs.EvaluationRequested(self.core.version, self.mode, tasks)
            self.act(self.core.handle(request, self.now))
        elif not evaluation.has_server() and self.mode == "held_server":
            self.act(self.core.handle(inputs.EvaluationAbandoned("no server"), self.now))
        # as the controller does: training needs the last server
        serving = [w for w in self.core.fleet.rollout.values() if not (w.is_held or w.is_fenced)]
        if evaluation.held_server() and not serving:
            self.act(self.core.handle(inputs.EvaluationAbandoned("needed"), self.now))
        # a server that was held and released is behind: the next update, or a snapshot, helps it
        behind = [
            w.name
            for w in serving
            if w.state is ServerState.SERVING and w.version < self.core.version and not w.is_held
        ]
        if behind and self.step_of == -1 and len(self.weights) == self.core.version:
            self.publish(behind)

    def publish(self, names: list[str]) -> None:
        held = self.core.evaluation.held_server()
        super().publish([name for name in names if held is None or name != held.name])

    def crash_server(self, server: Server) -> None:
        self.counts["crashes"] += server.alive
        super().crash_server(server)


@pytest.mark.parametrize("mode", ["held_server", "mixed"])
def test_training_goes_on_beside_evaluations_and_keeps_its_guarantees(
    mode: Literal["held_server", "mixed"],
) -> None:
    """Ledger and staleness are checked by the simulation, as without evaluations."""
    total: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        run = EvaluatedRun(seed, mode)
        try:
            run.run()
        except AssertionError as e:
            raise AssertionError(f"seed {seed}: {e}") from e
        total += run.counts
    print(f"{NUM_SEEDS} seeds: {dict(total)}")
    assert total["complete"] > NUM_SEEDS and total["batches"] > NUM_SEEDS
    assert total["crashes"] > 10  # of servers, also of held ones
