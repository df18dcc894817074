"""The running evaluation: which servers its samples may use, and when it is complete.

    pause         every server of exactly that version; no training group is leased meanwhile
    held_server   one of these, which is held at the version and gets no training group
    mixed         every server, at most a share of its capacity (MIXED_SHARE), after training

Each sample is a group of its own, outside of ledger and journal, and its load is counted apart from
that of training (`eval_load`): in the last two modes training is admitted, leased and selected as
if no evaluation ran. In the first two a sample with a token of another version is refused like a
failed one and generated again (`Leases.fault`).
"""

from __future__ import annotations

from megatron_async_rl.controller.core import actions
from megatron_async_rl.controller.core.actions import Action
from megatron_async_rl.controller.core.fleet import EvalLine, Fleet, RolloutWorker
from megatron_async_rl.controller.core.groups import EvaluationMode, Group, GroupState
from megatron_async_rl.controller.core.inputs import EvaluationRequested
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.state import ControllerState


class Evaluation:
    """At most one runs at a time; FinishEvaluation ends it."""

    def __init__(self, state: ControllerState, fleet: Fleet, leases: Leases) -> None:
        self.mode: EvaluationMode | None = None  # None: no evaluation runs
        self.version = -1
        self._state = state
        self._fleet = fleet
        self._leases = leases
        self._open: set[int] = set()  # groups

    @property
    def is_pausing(self) -> bool:
        """True while no training group may be leased."""
        return self.mode == "pause"

    def held_server(self) -> RolloutWorker | None:
        return next((w for w in self._fleet.rollout.values() if w.is_held), None)

    def has_server(self) -> bool:
        """Returns whether a server can generate the samples now, or when it has room."""
        return any(map(self._may_use, self._fleet.rollout.values()))

    def begin(self, request: EvaluationRequested) -> list[Action]:
        """Opens a group for each sample; ends at once if no server can be held."""
        assert self.mode is None, "an evaluation is running"
        self.mode, self.version = request.mode, request.version
        exact = None if request.mode == "mixed" else request.version
        for task in request.tasks:
            self._open.add(self._state.open_eval(task, exact).group_id)
        self.hold_server()
        if self.mode == "held_server" and not self.held_server():
            return self.abandon("held_server mode needs two servers of this version")
        return []

    def hold_server(self) -> None:
        """Holds the least loaded server of the version, if mode held_server needs one.

        Another server must continue to serve training.
        """
        if self.mode != "held_server" or self.held_server():
            return
        serving = [w for w in self._fleet.rollout.values() if w.is_serving]
        fitting = [w for w in serving if w.version == self.version]
        if fitting and len(serving) > 1:
            min(fitting, key=lambda w: (w.load, w.name)).is_held = True

    def lease(self, now: float) -> list[Action]:
        """Leases queued samples, in order, as far as servers are free."""
        sends: list[Action] = []
        while group := self._state.queued.next(1, "eval"):
            server = self._fleet.rollout.free_for_evaluation(self._fits)
            if server is None:
                break
            sends.append(self._leases.lease_to(server, group, now))
        return sends

    def sample_ended(self, group: Group, answer: str = "") -> list[Action]:
        """Takes a sample that is scored, or has no reward because it was dropped."""
        if group.group_id in self._state.groups:
            self._state.forget(group)
        self._open.discard(group.group_id)
        assert group.task
        reported = actions.ReportEvaluated(group.task, group.samples[0], group.rewards[0], answer)
        return [reported] if self._open else [reported, *self._finish("")]

    def abandon(self, reason: str) -> list[Action]:
        """Ends the evaluation without its open samples; their late replies are then fenced."""
        if self.mode is None:
            return []
        for group_id in self._open:
            group = self._state.groups[group_id]
            if group.state is GroupState.RUNNING:
                self._leases.unload(group)
            self._state.forget(group)
        self._open.clear()
        return self._finish(reason)

    def _finish(self, abandoned: str) -> list[Action]:
        if held := self.held_server():
            held.is_held = False
        self.mode = None
        return [actions.FinishEvaluation(self.version, abandoned)]

    def _fits(self, line: EvalLine) -> bool:
        return line.has_share if self.mode == "mixed" else self._is_chosen(line)

    def _may_use(self, server: RolloutWorker) -> bool:
        return server.is_serving and (self.mode == "mixed" or self._is_chosen(server))

    def _is_chosen(self, place: EvalLine | RolloutWorker) -> bool:
        """Returns whether samples of an exact version may run on this worker."""
        return place.version == self.version and place.is_held == (self.mode == "held_server")
