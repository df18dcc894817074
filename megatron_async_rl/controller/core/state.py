"""The persistent state of a run: its groups, the ledger over them, and the version of the weights.

It changes in one place, `_apply`, one journal event at a time. The core records an event for every
change; a restarted controller applies the same events again, so restoring needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_async_rl.controller.core.groups import (
    DropReason,
    EvaluationTask,
    Group,
    GroupState,
    Ledger,
)
from megatron_async_rl.controller.core.index import GroupIndex, QueuedGroups, RunningGroups
from megatron_async_rl.controller.core.kv_cache import ResponseLengths
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.journal import events
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Prompt, Purpose


class ControllerState:
    def __init__(
        self, settings: CoreSettings, next_prompt: Callable[[], Prompt], epoch: int
    ) -> None:
        self.epoch = epoch
        self.version = 0  # of the trainer's weights
        self.ledger = Ledger()
        self.groups: dict[int, Group] = {}  # pending ones, and those of an evaluation
        self.queued, self.running, self.ready = QueuedGroups(), RunningGroups(), GroupIndex()
        self._by_state: dict[GroupState, GroupIndex] = {
            GroupState.QUEUED: self.queued,
            GroupState.RUNNING: self.running,
            GroupState.READY: self.ready,
            GroupState.IN_BATCH: GroupIndex(),
        }
        self.in_batch: list[Group] = []  # being trained
        self.recorded: list[events.JournalEvent] = []  # not yet taken to the journal
        self.lengths = ResponseLengths(settings.max_new_tokens / 2)
        self._samples_per_prompt = settings.samples_per_prompt
        self._next_prompt = next_prompt
        self._next_group_id = 0

    # ---- writing

    def admit(self) -> Group:
        """Makes a group of the next prompt."""
        group_id, prompt = self._next_group_id, self._next_prompt()
        self.recorded.append(events.GroupAdmitted(group_id, prompt.prompt_id))
        return self._admit(group_id, prompt)

    def open_eval(self, task: EvaluationTask, exact_version: int | None) -> Group:
        """Makes a group of one sample that is not part of the ledger."""
        group = self._open(self._next_group_id, task.prompt, "eval", 1)
        group.task, group.exact_version = task, exact_version
        return group

    def record(self, event: events.JournalEvent) -> None:
        """Applies a change. Records it too, except in an evaluation, which is repeated instead."""
        group = self.groups.get(getattr(event, "group_id", -1))
        if group is None or group.purpose == "train":
            self.recorded.append(event)
        self._apply(event)

    def move(self, group: Group, state: GroupState) -> None:
        del self._by_state[group.state][group.group_id]
        group.state = state
        self._by_state[state][group.group_id] = group

    def forget(self, group: Group) -> None:
        del self.groups[group.group_id]
        del self._by_state[group.state][group.group_id]

    def take_events(self) -> list[events.JournalEvent]:
        """Returns the events recorded since the last call."""
        recorded, self.recorded = self.recorded, []
        return recorded

    def restore(self, recorded: Iterable[events.AnyEvent]) -> None:
        for event in recorded:
            self._apply(event)

    # ---- reading

    @property
    def pending(self) -> int:
        """Number of groups that are admitted and neither trained nor dropped."""
        return sum(group.purpose == "train" for group in self.groups.values())

    def in_state(self, *states: GroupState, purpose: Purpose | None = None) -> list[Group]:
        """Returns groups in admission order. Scans and sorts them: not for every event."""
        found = [
            group
            for state in states
            for group in self._by_state[state].values()
            if purpose in (None, group.purpose)
        ]
        return sorted(found, key=lambda group: group.group_id)

    def check(self) -> None:
        """Raises LedgerError unless every admitted group is accounted for."""
        self.ledger.check(self.pending)
        num_indexed = sum(map(len, self._by_state.values()))
        assert num_indexed == len(self.groups), "a group is in no state, or in two"

    # ---- inside

    def _apply(self, event: events.JournalEvent) -> None:
        match event:
            case events.ControllerStarted():
                self.epoch = event.epoch
            case events.GroupAdmitted():
                self._apply_admitted(event)
            case events.BatchSelected():
                self.in_batch = [self.groups[group_id] for group_id in event.group_ids]
                for group in self.in_batch:
                    self.move(group, GroupState.IN_BATCH)
            case events.BatchTrained():
                for group in self.in_batch:
                    self.forget(group)
                    self.ledger.trained += 1
                self.in_batch, self.version = [], event.version
            case events.GroupDropped():
                group = self.groups[event.group_id]
                self.forget(group)
                if group.purpose == "train":
                    self.ledger.dropped[DropReason(event.reason)] += 1
            case events.StepReported():
                pass
            case _:
                self._apply_to_group(self.groups[event.group_id], event)  # type: ignore[attr-defined]

    def _apply_admitted(self, event: events.GroupAdmitted) -> None:
        prompt = self._next_prompt()
        if prompt.prompt_id != event.prompt_id:
            raise DataError(
                f"the journal admitted prompt {event.prompt_id!r} where data.train now gives "
                f"{prompt.prompt_id!r}: the dataset or run.seed changed since the run began; "
                "restore them, or start over with --from-scratch"
            )
        self._admit(event.group_id, prompt)

    def _apply_to_group(self, group: Group, event: events.JournalEvent) -> None:
        match event:
            case events.LeaseGranted():
                del self._by_state[group.state][group.group_id]  # its worker is part of the index
                group.worker, group.attempt = event.worker, event.attempt
                group.floor_version = event.floor_version
                group.state = GroupState.RUNNING
                self.running[group.group_id] = group
            case events.LeaseFailed():
                self.move(group, GroupState.QUEUED)
                group.failed_on.append(event.worker)
                group.worker = ""
            case events.PartialSaved():
                group.partials[event.index] = event.partial
            case events.SampleReturned():
                group.samples[event.index] = event.sample
                oldest = event.sample.oldest_version
                if group.oldest_returned is None or oldest < group.oldest_returned:
                    group.oldest_returned = oldest
                group.partials.pop(event.index, None)
                if group.purpose == "train":
                    self.lengths.add(group.prompt, event.sample)
                self._by_state[group.state].changed(group)
            case events.SampleScored():
                group.rewards[event.index] = event.reward
                if event.turn_rewards:
                    group.turn_rewards[event.index] = event.turn_rewards
                if group.is_scored:
                    self.move(group, GroupState.READY)

    def _admit(self, group_id: int, prompt: Prompt) -> Group:
        self.ledger.admitted += 1
        return self._open(group_id, prompt, "train", self._samples_per_prompt)

    def _open(self, group_id: int, prompt: Prompt, purpose: Purpose, num_samples: int) -> Group:
        group = Group(group_id, prompt, purpose, [None] * num_samples, [None] * num_samples)
        self._next_group_id = max(self._next_group_id, group_id + 1)
        self.groups[group_id] = self._by_state[group.state][group_id] = group
        return group
