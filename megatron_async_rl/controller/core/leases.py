"""Assigns samples to servers: admission, leases, and the check of replies.

Admission (AReaL eq. 3). With B = prompts_per_step, eta = max_staleness and N groups admitted and
not dropped, a new group may start on a server of version v iff N < (v + eta + 1) * B: it is trained
at step N // B at the latest if order is kept. The server's version counts; the trainer's is one
ahead during an update. This alone does not bound the staleness of stragglers; batch_selection.py
does.

A server gets samples up to max_concurrent_samples and, by the KV cache that they are expected to
need, until it is full (kv_cache.py).

A lease is one attempt at the missing samples of a group, by one worker, until a deadline. A reply
with another epoch, attempt or worker changes nothing (fencing).
"""

from __future__ import annotations

import logging

from megatron_async_rl.controller.core.actions import Send
from megatron_async_rl.controller.core.fleet import Fleet, RolloutWorker
from megatron_async_rl.controller.core.groups import DropReason, Group, GroupState
from megatron_async_rl.controller.core.kv_cache import KvLimit
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.controller.journal.events import LeaseFailed, LeaseGranted
from megatron_async_rl.controller.tokens import token_fault
from megatron_async_rl.protocol import messages
from megatron_async_rl.protocol.types import Partial, Sample

logger = logging.getLogger(__name__)
LeaseReply = (
    messages.Generated | messages.GenerateFailed | messages.PartialSample | messages.ScoreRequest
)


class Leases:
    def __init__(self, settings: CoreSettings, state: ControllerState, fleet: Fleet) -> None:
        self._settings = settings
        self._state = state
        self._fleet = fleet
        self.kv_limit = KvLimit(settings, state.lengths)

    @property
    def next_step(self) -> int:
        """The step at which a group admitted now is trained at the latest, if order is kept.

        N // B, for any B that a resumed run has: the trained groups count as one step each.
        """
        ledger = self._state.ledger
        num_waiting = ledger.claimed - ledger.trained
        return self._state.version + num_waiting // self._settings.prompts_per_step

    def lease_queued(self, now: float) -> list[Send]:
        """Leases queued training groups, oldest admission first, as far as servers are free.

        A group that no server has room for is passed over; no later lease makes room for it.
        """
        sends, servers = [], self._fleet.rollout
        oldest_allowed = self._state.version - self._settings.max_staleness
        while group := self._state.queued.next(servers.max_room(oldest_allowed), "train"):
            if server := self._free_server(len(group.missing), oldest_allowed):
                sends.append(self.lease_to(server, group, now))
        return sends

    def admit(self, now: float) -> list[Send]:
        """Admits and leases new groups as far as max_staleness and the servers allow."""
        settings, sends = self._settings, []
        while self.next_step < settings.steps:
            oldest_allowed = self.next_step - settings.max_staleness
            server = self._free_server(settings.samples_per_prompt, oldest_allowed)
            if server is None:
                break
            sends.append(self.lease_to(server, self._state.admit(), now))
        return sends

    def _free_server(self, num_samples: int, oldest_allowed: int) -> RolloutWorker | None:
        """Returns the least loaded server that is not full by the present expectation."""
        while server := self._fleet.rollout.least_loaded(num_samples, oldest_allowed):
            self.kv_limit.update(server)
            if not server.is_full:
                return server
        return None

    def lease_to(self, server: RolloutWorker, group: Group, now: float) -> Send:
        """Leases the missing samples of a queued group to a server that has room."""
        settings, missing = self._settings, group.missing
        oldest_allowed = self._state.version - settings.max_staleness
        partials = {i: p for i, p in group.partials.items() if p.oldest_version >= oldest_allowed}
        floor_version = min([server.version, *(p.oldest_version for p in partials.values())])
        self._state.record(
            LeaseGranted(group.group_id, group.attempt + 1, server.name, floor_version)
        )
        self._state.running.set_deadline(group.group_id, now + settings.lease_timeout_s)
        task = group.task
        self._load(server, group, len(missing), len(group.prompt.ids))
        lease = messages.Generate(
            epoch=self._state.epoch,
            group_id=group.group_id,
            attempt=group.attempt,
            indices=missing,
            purpose=group.purpose,
            prompt=group.prompt,
            max_new_tokens=task.max_new_tokens if task else settings.max_new_tokens,
            temperature=task.temperature if task else settings.temperature,
            partials=[partials.get(index) for index in missing] if partials else [],
            floor_version=floor_version,
            **(task.truncation if task else settings.truncation),
        )
        return Send(server.name, lease)

    def group_of(self, worker: str, reply: LeaseReply) -> Group | None:
        """Returns the group that the reply may change; None if late, duplicate or foreign."""
        key = reply.key
        group = self._state.groups.get(key.group_id)
        if group is None or group.state is not GroupState.RUNNING or group.worker != worker:
            return None
        if (key.epoch, key.attempt) != (self._state.epoch, group.attempt):
            return None
        return group if key.index in group.missing else None

    def fault(self, group: Group, tokens: Sample | Partial) -> str:
        """Returns why the tokens cannot be of a server of this run; empty if they can."""
        newest = self._state.version if group.exact_version is None else group.exact_version
        return token_fault(tokens, group.prompt, group.floor_version, newest, self._settings)

    def skip_faulty_partials(self) -> None:
        """Forgets restored partial samples that an earlier version of the program did not check."""
        for group in self._state.groups.values():
            for index, partial in list(group.partials.items()):
                fault = token_fault(partial, group.prompt, 0, self._state.version, self._settings)
                if fault:
                    del group.partials[index]
                    logger.error(
                        "the journal's partial sample %d.%d is skipped: %s",
                        group.group_id, index, fault,
                    )  # fmt: skip

    def sample_returned(self, group: Group) -> None:
        """Reduces the load of the group's server by a sample that has just been recorded."""
        self._unload(group, 1, is_last=not group.missing)

    def unload(self, group: Group) -> None:
        """Reduces the load of the group's server by all missing samples, which it gives up."""
        if count := len(group.missing):
            self._unload(group, count, is_last=True)

    def _unload(self, group: Group, count: int, is_last: bool) -> None:
        if server := self._fleet.rollout.get(group.worker):
            self._load(server, group, -count, -len(group.prompt.ids) if is_last else 0)

    def _load(
        self, server: RolloutWorker, group: Group, num_samples: int, prompt_tokens: int
    ) -> None:
        """Changes the load of a server by samples of a group, and by its prompt."""
        if group.purpose == "eval":
            server.eval_load += num_samples
            if prompt_tokens:
                server.eval_prompt_tokens += prompt_tokens
        else:
            server.load += num_samples
            if prompt_tokens:
                server.prompt_tokens += prompt_tokens
        self.kv_limit.update(server)

    def held_by(self, worker: str) -> list[Group]:
        return [group for group in self._state.running.of(worker) if group.missing]

    def release(self, group: Group) -> DropReason | None:
        """Ends a failed lease: returned samples are kept, the others are leased again.

        Returns a reason to drop the group instead after max_attempts failed leases.
        """
        self.unload(group)
        self._state.record(LeaseFailed(group.group_id, group.worker))
        if len(group.failed_on) < self._settings.max_attempts:
            return None
        several = len(set(group.failed_on)) > 1  # then the prompt is suspected, not a server
        return DropReason.POISON if several else DropReason.GENERATION_FAILED
