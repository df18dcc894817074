"""What the core may not forget: the groups, the ledger over them, and the version of the weights.

It is changed in one place, `_apply`, one fact at a time (facts.py). An event of the core records its facts; the shell
writes them to the journal before it acts, and a later life applies them again: restoring runs the code that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_async_rl.controller.core.events import (
    AnyEvent,
    BatchSelected,
    BatchTrained,
    ControllerStarted,
    GroupAdmitted,
    GroupDropped,
    JournalEvent,
    LeaseFailed,
    LeaseGranted,
    PartialSaved,
    SampleReturned,
    SampleScored,
)
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.ledger import DropReason, Ledger
from megatron_async_rl.errors import DataError
from megatron_async_rl.protocol.types import Prompt, Purpose


class ControllerState:
    def __init__(
        self, samples_per_prompt: int, next_prompt: Callable[[], Prompt], epoch: int
    ) -> None:
        self.epoch = epoch
        self.version = 0  # of the trainer's weights
        self.ledger = Ledger()
        self.groups: dict[int, Group] = {}  # pending ones; those of an evaluation too
        self._by_state: dict[GroupState, dict[int, Group]] = {
            state: {} for state in GroupState
        }  # the same
        self.in_batch: list[Group] = []  # with the trainer
        self.facts: list[JournalEvent] = []  # recorded and not yet taken to the journal
        self._samples_per_prompt = samples_per_prompt
        self._next_prompt = next_prompt
        self._next_group_id = 0

    # ---- writing

    def admit(self) -> Group:
        """The next prompt of the stream becomes a group."""
        group_id, prompt = self._next_group_id, self._next_prompt()
        self.facts.append(GroupAdmitted(group_id, prompt.prompt_id))
        return self._admit(group_id, prompt)

    def open_eval(self, prompt: Prompt) -> Group:
        """A group of one sample that is no part of the ledger."""
        return self._open(self._next_group_id, prompt, "eval", 1)

    def record(self, fact: JournalEvent) -> None:
        """Makes a change that must survive. Evaluations are not kept: they are made again."""
        group = self.groups.get(getattr(fact, "group_id", -1))
        if group is None or group.purpose == "train":
            self.facts.append(fact)
        self._apply(fact)

    def move(self, group: Group, state: GroupState) -> None:
        del self._by_state[group.state][group.group_id]
        self._by_state[state][group.group_id] = group
        group.state = state

    def forget(self, group: Group) -> None:
        del self.groups[group.group_id]
        del self._by_state[group.state][group.group_id]

    def take_events(self) -> list[JournalEvent]:
        facts, self.facts = self.facts, []
        return facts

    def restore(self, facts: Iterable[AnyEvent]) -> None:
        for fact in facts:
            self._apply(fact)

    # ---- reading

    @property
    def pending(self) -> int:
        return sum(group.purpose == "train" for group in self.groups.values())

    def in_state(self, *states: GroupState, purpose: Purpose | None = None) -> list[Group]:
        """In the order of admission. It is asked at every event, when thousands of groups may be pending."""
        found = [
            g
            for state in states
            for g in self._by_state[state].values()
            if purpose in (None, g.purpose)
        ]
        return sorted(found, key=lambda group: group.group_id)

    def check(self) -> None:
        """Raises LedgerError unless every admitted group is accounted for."""
        self.ledger.check(self.pending)
        assert sum(map(len, self._by_state.values())) == len(self.groups), (
            "a group is in no state, or in two"
        )

    # ---- inside

    def _apply(self, fact: JournalEvent) -> None:
        if isinstance(fact, ControllerStarted):
            self.epoch = fact.epoch
        elif isinstance(fact, GroupAdmitted):
            self._apply_admitted(fact)
        elif isinstance(fact, BatchSelected):
            self.in_batch = [self.groups[group_id] for group_id in fact.group_ids]
            for group in self.in_batch:
                self.move(group, GroupState.IN_BATCH)
        elif isinstance(fact, BatchTrained):
            for group in self.in_batch:
                self.forget(group)
                self.ledger.trained += 1
            self.in_batch, self.version = [], fact.version
        elif isinstance(fact, GroupDropped):
            group = self.groups[fact.group_id]
            self.forget(group)
            if group.purpose == "train":
                self.ledger.dropped[DropReason(fact.reason)] += 1
        elif isinstance(
            fact, LeaseGranted | LeaseFailed | PartialSaved | SampleReturned | SampleScored
        ):
            self._apply_to_group(self.groups[fact.group_id], fact)

    def _apply_admitted(self, fact: GroupAdmitted) -> None:
        prompt = self._next_prompt()
        if prompt.prompt_id != fact.prompt_id:
            raise DataError(
                f"the journal admitted prompt {fact.prompt_id!r} where data.train now gives {prompt.prompt_id!r}: the dataset "
                "or run.seed changed since the run began; put them back, or begin anew with --from-scratch"
            )
        self._admit(fact.group_id, prompt)

    def _apply_to_group(
        self,
        group: Group,
        fact: LeaseGranted | LeaseFailed | PartialSaved | SampleReturned | SampleScored,
    ) -> None:
        if isinstance(fact, LeaseGranted):
            self.move(group, GroupState.RUNNING)
            group.worker, group.attempt, group.floor_version = (
                fact.worker,
                fact.attempt,
                fact.floor_version,
            )
        elif isinstance(fact, LeaseFailed):
            group.failed_on.append(fact.worker)
            self.move(group, GroupState.QUEUED)
            group.worker = ""
        elif isinstance(fact, PartialSaved):
            group.partials[fact.index] = fact.partial
        elif isinstance(fact, SampleReturned):
            group.samples[fact.index] = fact.sample
            oldest = fact.sample.oldest_version
            group.oldest_returned = min(
                oldest, oldest if group.oldest_returned is None else group.oldest_returned
            )
            group.partials.pop(fact.index, None)
        else:
            group.rewards[fact.index] = fact.reward
            if group.is_judged:
                self.move(group, GroupState.READY)

    def _admit(self, group_id: int, prompt: Prompt) -> Group:
        self.ledger.admitted += 1
        return self._open(group_id, prompt, "train", self._samples_per_prompt)

    def _open(self, group_id: int, prompt: Prompt, purpose: Purpose, num_samples: int) -> Group:
        group = Group(group_id, prompt, purpose, [None] * num_samples, [None] * num_samples)
        self._next_group_id = max(self._next_group_id, group_id + 1)
        self.groups[group_id] = self._by_state[group.state][group_id] = group
        return group
