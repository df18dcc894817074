"""The decisions of the controller: a state machine without sockets, clock or threads.

`handle` takes one event (inputs.py) and returns the actions that follow (actions.py). Time is an
argument and prompts come from an injected source, so the same code runs in the controller, in a
simulation on a virtual clock, and in a search of all its states.

The states of a training group, and the files that implement the transitions:

    QUEUED --leased--> RUNNING --all returned and scored--> READY --selected--> IN_BATCH --> trained
       |  leases.py                  scoring.py               |  batch_selection.py
       ^                  |                                   |
       +-- worker lost, lease expired (attempt + 1) ----------+-----> dropped(reason)

State that must survive a restart is in state.py and recorded as journal events; liveness, load and
assignments are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron_async_rl.controller.core import actions, inputs
from megatron_async_rl.controller.core.actions import Actions
from megatron_async_rl.controller.core.batch_selection import BatchSelector
from megatron_async_rl.controller.core.evaluation import Evaluation
from megatron_async_rl.controller.core.fleet import Fleet, RolloutWorker, ServerState, Worker
from megatron_async_rl.controller.core.groups import DropReason, Group, GroupState
from megatron_async_rl.controller.core.leases import Leases
from megatron_async_rl.controller.core.scoring import ScoringQueue, ScoringTask, refusal
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal import events
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.types import Prompt


class Core:
    def __init__(
        self, settings: CoreSettings, next_prompt: Callable[[], Prompt], epoch: int = 1
    ) -> None:
        self.settings = settings
        self.fleet = Fleet()
        self.state = ControllerState(settings, next_prompt, epoch)
        self.leases = Leases(settings, self.state, self.fleet)
        self.scoring = ScoringQueue(settings, self.state, self.leases, self.fleet)
        self.batch_selector = BatchSelector(settings, self.state)
        self.admitting = False
        self.draining = False
        self.batches_held = False
        self.num_fenced_messages = 0
        self.num_replayed_steps = 0
        self.resent_version: int | None = None  # of the recorded batch that the trainer repeats
        self.evaluation = Evaluation(self.state, self.fleet, self.leases)
        self._message_handlers: dict[type, Callable[[str, Any, float], Actions]] = {
            messages.Heartbeat: self._heartbeat,
            messages.Generated: self._generated,
            messages.PartialSample: self._partial_sample,
            messages.GenerateFailed: self._generate_failed,
            messages.ScoreRequest: self._score_requested,
            messages.ScoreResult: self._score_received,
            messages.StepDone: self._step_done,
        }

    def handle(self, event: inputs.CoreEvent, now: float) -> Actions:
        """Applies one event and returns the actions that follow from it."""
        match event:
            case inputs.Received():
                return self._received(event, now)
            case inputs.RolloutJoined():
                return self._rollout_joined(event, now)
            case inputs.RewardJoined():
                followed = self._lose(event.worker, now)
                self.fleet.reward[event.worker] = Worker(event.worker, event.capacity, now)
                return followed + self._advance(now)
            case inputs.WorkerLost():
                return self._lose(event.worker, now)
            case inputs.UpdateStarted() | inputs.ServerUpdated() | inputs.UpdateFailed():
                return self._server_changed(event, now)
            case inputs.ServerFenced():
                return self._server_fenced(event, now)
            case inputs.TrainerJoined():
                if event.leader >= 0:  # others wait for their leader, and join when they offer
                    self.batch_selector.leader_joined(event.leader)
                    self.batches_held = False
                return []
            case inputs.BatchRequested():
                return self._batch_requested(event, now)
            case inputs.BatchesHeld():
                self.batches_held = event.held
            case inputs.AdmissionOpened():
                self.admitting = True
            case inputs.EvaluationRequested():
                return self.evaluation.begin(event) + self._advance(now)
            case inputs.EvaluationAbandoned():
                return self.evaluation.abandon(event.reason) + self._advance(now)
            case inputs.Tick():
                return self._tick(now)
            case inputs.DrainStarted():
                self.draining = True
                return []
            case inputs.RunEnded():
                return self._run_ended()
        return self._advance(now)

    # ---- reading

    @property
    def epoch(self) -> int:
        """Number of controller starts; a reply that carries another one is fenced."""
        return self.state.epoch

    @property
    def version(self) -> int:
        """Version of the trainer's weights."""
        return self.state.version

    @property
    def batch_awaited(self) -> bool:
        """All leaders wait for a batch of the newest version that is not selected yet."""
        return self.batch_selector.requested_since is not None

    # ---- restarts

    def restore(self, recorded: Iterable[events.AnyEvent]) -> None:
        """Rebuilds the state from the journal and begins the next epoch: no workers, no leases."""
        self.state.restore(recorded)
        self.leases.skip_faulty_partials()
        started = events.ControllerStarted(self.epoch + 1, self.settings.max_staleness)
        self.state.record(started)
        for group in list(self.state.groups.values()):
            if group.state is GroupState.READY:
                self._complete(group)  # the crash may have come before its drop was recorded
            elif group.state is not GroupState.IN_BATCH:
                if group.missing:
                    self.state.move(group, GroupState.QUEUED)
                    group.worker = ""
                self.scoring.enqueue_unscored(group)
                if group.is_scored:  # by an agent; the crash came before that was recorded
                    self._complete(group)
        self.state.check()

    # ---- workers

    def _rollout_joined(self, event: inputs.RolloutJoined, now: float) -> Actions:
        followed = self._lose(event.worker, now)  # the leases of an earlier incarnation
        server = self.fleet.join_rollout(event.worker, event.capacity, now)
        if 0 <= event.serving <= self.version:
            server.state, server.version = ServerState.SERVING, event.serving
            followed += self._advance(now)
        return followed

    def _lose(self, worker: str, now: float) -> Actions:
        if self.fleet.rollout.pop(worker, None):
            lost = actions.ServerLost(worker)
            return [lost, *self._release_all(worker), *self._advance(now)]
        if self.fleet.reward.pop(worker, None):
            self.scoring.requeue_from(worker)
        return self._advance(now)

    def _received(self, event: inputs.Received, now: float) -> Actions:
        self.fleet.heard(event.worker, now)
        handler = self._message_handlers.get(type(event.message))
        return handler(event.worker, event.message, now) if handler else []

    def _heartbeat(self, worker: str, heartbeat: messages.Heartbeat, now: float) -> Actions:
        server = self.fleet.rollout.get(worker)
        has_room = server and self.leases.kv_limit.report(server, heartbeat.engine)
        return self._advance(now) if has_room else []

    # ---- weights of the servers

    def _server(self, event: inputs.ServerEvent) -> RolloutWorker | None:
        """Returns the server; None if that incarnation is gone or fenced."""
        server = self.fleet.rollout.get(event.worker)
        if server is None or server.is_fenced:
            return None
        return server if event.incarnation in (None, server.incarnation) else None

    def _server_changed(self, event: inputs.ServerEvent, now: float) -> Actions:
        server = self._server(event)
        if isinstance(event, inputs.ServerUpdated):
            if server:
                server.state, server.version = ServerState.SERVING, event.version
            return self._advance(now)
        if server:
            is_started = isinstance(event, inputs.UpdateStarted)
            server.state = ServerState.UPDATING if is_started else ServerState.STALE
        return []

    def _server_fenced(self, event: inputs.ServerFenced, now: float) -> Actions:
        server = self._server(event)
        if server is None:
            return []
        server.state, server.fenced_because = ServerState.FENCED, event.reason
        server.is_held = False
        shutdown = actions.Send(server.name, messages.Shutdown(f"fenced: {event.reason}"))
        error = actions.ReportError(f"{server.name} is fenced: {event.reason}")
        return [error, *self._release_all(server.name), *self._advance(now), shutdown]

    # ---- samples

    def _generated(self, worker: str, reply: messages.Generated, now: float) -> Actions:
        group = self.leases.group_of(worker, reply)
        if group is None:
            return self._fence()
        if fault := self.leases.fault(group, reply.sample):
            self.num_fenced_messages += 1
            error = actions.ReportError(f"{worker}: sample {reply.key} is refused: {fault}")
            # treated as a failure: another server may succeed
            return [error, *self._release(group), *self._advance(now)]
        self.state.record(events.SampleReturned(group.group_id, reply.key.index, reply.sample))
        self.leases.sample_returned(group)
        self.scoring.enqueue_sample(group, reply.key.index)
        completed = self._complete(group) if group.is_scored else []
        return [actions.ReportSample(reply.sample), *completed, *self._advance(now)]

    def _partial_sample(self, worker: str, reply: messages.PartialSample, now: float) -> Actions:
        group = self.leases.group_of(worker, reply)
        if group is None:
            return self._fence()
        if fault := self.leases.fault(group, reply.partial):
            self.num_fenced_messages += 1  # the sample itself may still be good
            return [
                actions.ReportError(f"{worker}: partial sample {reply.key} is refused: {fault}")
            ]
        self.state.record(events.PartialSaved(group.group_id, reply.key.index, reply.partial))
        return []

    def _generate_failed(self, worker: str, reply: messages.GenerateFailed, now: float) -> Actions:
        group = self.leases.group_of(worker, reply)
        return self._release(group) + self._advance(now) if group else self._fence()

    def _fence(self) -> Actions:
        self.num_fenced_messages += 1
        return []

    # ---- scores

    def _score_requested(self, worker: str, request: messages.ScoreRequest, now: float) -> Actions:
        group = self.leases.group_of(worker, request)
        if group is None:
            self.num_fenced_messages += 1
            return [refusal(worker, request, "the lease has ended")]
        self.scoring.enqueue_request(worker, request, group)
        return self._advance(now)

    def _score_received(self, worker: str, result: messages.ScoreResult, now: float) -> Actions:
        task = self.scoring.complete(worker, result)
        if task is None:
            return self._fence()
        if result.reward is None:
            followed = self._scoring_failed(task, result.error)
        elif fault := self.scoring.fault(task, result):
            followed = self._no_score(task, fault)
        elif task.requester:
            followed = [actions.Send(task.requester, result)]
        else:
            group = self.scoring.record(result)
            followed = self._complete(group, result.answer) if group and group.is_scored else []
        return followed + self._advance(now)

    def _no_score(self, task: ScoringTask, error: str) -> Actions:
        """Ends an attempt that failed without a report of the reward worker."""
        where = f"{task.worker}: no score for sample {task.request.key}"
        return [actions.ReportScoringError(where, error), *self._scoring_failed(task, error)]

    def _scoring_failed(self, task: ScoringTask, error: str) -> Actions:
        if self.scoring.retry(task):
            return []
        if task.requester:
            return [refusal(task.requester, task.request, error)]
        group = self.state.groups.get(task.request.key.group_id)
        return self._drop(group, DropReason.REWARD_UNAVAILABLE) if group else []

    # ---- trainer

    def _batch_requested(self, event: inputs.BatchRequested, now: float) -> Actions:
        # another leader's request may overtake the first rank's report of the step
        if event.version > self.version + bool(self.state.in_batch):
            return self._fence()
        batch = self.batch_selector.request(event.leader, event.version, now)
        if isinstance(batch, actions.ResendBatch):
            self.resent_version = batch.version
        return [batch] if batch else self._advance(now)

    def _step_done(self, worker: str, step: messages.StepDone, now: float) -> Actions:
        """The batch of version - 1 is in the weights: its groups count as trained."""
        if step.version <= self.version:
            if step.version - 1 != self.resent_version:
                return self._fence()  # the trainer repeats a report that has no answer yet
            self.resent_version = None
            self.num_replayed_steps += 1
            return [actions.ReportStep(step.version, None)]
        if step.version != self.version + 1 or not self.state.in_batch:
            return self._fence()
        self.state.record(events.BatchTrained(step.version))
        self.state.check()
        self.batch_selector.note_waiting(now)  # a report that was lost came after the requests
        return [actions.ReportStep(step.version, step.stats), *self._advance(now)]

    # ---- the run

    def _tick(self, now: float) -> Actions:
        followed: Actions = []
        for name in self.fleet.silent_since(now - self.settings.heartbeat_timeout_s):
            followed += self._lose(name, now)
        for group in self.state.running.take_expired(now):
            followed += self._release(group)
        limit = f"no score within rollout.lease_timeout_s = {self.settings.lease_timeout_s:g}"
        for task in self.scoring.take_expired(now):
            followed += self._no_score(task, limit)
        return followed + self._advance(now)

    def _run_ended(self) -> Actions:
        self.admitting = False
        followed: Actions = []
        for group in [g for g in self.state.groups.values() if g.purpose == "train"]:
            followed += self._drop(group, DropReason.RUN_ENDED)
        self.state.check()
        return followed

    # ---- helpers

    def _advance(self, now: float) -> Actions:
        """Does everything that has become possible: scoring, selection, leases, admissions."""
        followed: Actions = [*self.scoring.assign(now)]
        if self.batch_awaited and not self.batches_held and not self.draining:
            for group in self.batch_selector.stale_groups():
                followed += self._drop(group, DropReason.STALE)
            batch = self.batch_selector.select(now)
            followed += [batch] if batch else []
        self.evaluation.hold_server()
        if not self.evaluation.is_pausing:
            followed += self.leases.lease_queued(now)
            if self.admitting and not self.draining:
                followed += self.leases.admit(now)
        return followed + self.evaluation.lease(now)

    def _release_all(self, worker: str) -> Actions:
        return [action for group in self.leases.held_by(worker) for action in self._release(group)]

    def _release(self, group: Group) -> Actions:
        reason = self.leases.release(group)
        return self._drop(group, reason) if reason else []

    def _complete(self, group: Group, answer: str = "") -> Actions:
        """Ends a sample of an evaluation, or drops a scored group that the filters exclude."""
        if group.purpose == "eval":
            return self.evaluation.sample_ended(group, answer)
        rewards = [reward for reward in group.rewards if reward is not None]
        lengths = [sample.num_generated for sample in group.samples if sample]
        for reason, keeps in self.settings.filter_rules:
            if not keeps(rewards, lengths, group.prompt.row):
                return self._drop(group, reason)
        return []

    def _drop(self, group: Group, reason: DropReason) -> Actions:
        if group.state is GroupState.RUNNING:
            self.leases.unload(group)  # later replies are fenced
        self.state.record(events.GroupDropped(group.group_id, reason.value))
        if group.purpose == "eval":
            return self.evaluation.sample_ended(group)
        return [actions.ReportDrop(group, reason)]
