"""Which server generates which samples: admission, leases, and who may answer for them.

Admission (AReaL eq. 3). With B = prompts_per_step and N groups admitted and not dropped, a new one may start on a
server of version v iff  N < (v + eta + 1) * B:  it will be trained at step N // B at the latest if order is kept. The
server's version counts, not the trainer's, which is one ahead while an update is under way. That alone does not bound
the staleness of stragglers; the cut does (cut.py).

A lease is one attempt at the missing samples of a group, by one worker, until a deadline. Whatever comes back under
another epoch, attempt or worker changes nothing (fencing).
"""

from __future__ import annotations

import math

from megatron_async_rl.controller.core.actions import Send
from megatron_async_rl.controller.core.events import LeaseFailed, LeaseGranted
from megatron_async_rl.controller.core.fleet import Fleet, RolloutWorker
from megatron_async_rl.controller.core.groups import Group, GroupState
from megatron_async_rl.controller.core.ledger import DropReason
from megatron_async_rl.controller.core.settings import CoreSettings
from megatron_async_rl.controller.core.state import ControllerState
from megatron_async_rl.protocol.messages import (
    Generate,
    Generated,
    GenerateFailed,
    PartialSample,
    ScoreRequest,
)
from megatron_async_rl.protocol.types import NOT_GENERATED, Sample


class Leases:
    def __init__(self, rules: CoreSettings, state: ControllerState, fleet: Fleet) -> None:
        self._settings = rules
        self._state = state
        self._fleet = fleet

    @property
    def next_step(self) -> int:
        """The step at which a group admitted now is trained at the latest, if order is kept."""
        return self._state.ledger.claimed // self._settings.prompts_per_step

    # ---- out

    def lease_queued(self, now: float, only_eval: bool) -> list[Send]:
        """Groups that wait for a server, as far as there are free ones."""
        sends = []
        for group in self._state.in_state(GroupState.QUEUED, purpose="eval" if only_eval else None):
            server = self._fleet.free_server(
                len(group.missing), self._state.version - self._settings.max_staleness
            )
            if server is not None:
                sends.append(self._lease_to(server, group, now))
        return sends

    def admit(self, now: float) -> list[Send]:
        """New groups, as far as eta and the servers allow."""
        sends = []
        while self.next_step < self._settings.steps:
            server = self._fleet.free_server(
                self._settings.samples_per_prompt, self.next_step - self._settings.max_staleness
            )
            if server is None:
                break
            sends.append(self._lease_to(server, self._state.admit(), now))
        return sends

    def _lease_to(self, server: RolloutWorker, group: Group, now: float) -> Send:
        rules, missing = self._settings, group.missing
        oldest_allowed = self._state.version - rules.max_staleness
        partials = {i: p for i, p in group.partials.items() if p.oldest_version >= oldest_allowed}
        floor_version = min([server.version, *(p.oldest_version for p in partials.values())])
        self._state.record(
            LeaseGranted(group.group_id, group.attempt + 1, server.name, floor_version)
        )
        group.deadline = now + rules.lease_timeout_s
        server.load += len(missing)
        return Send(
            server.name,
            Generate(
                epoch=self._state.epoch,
                group_id=group.group_id,
                attempt=group.attempt,
                indices=missing,
                purpose=group.purpose,
                prompt=group.prompt,
                max_new_tokens=rules.max_new_tokens,
                temperature=rules.temperature
                if group.purpose == "train"
                else rules.eval_temperature,
                partials=[partials.get(index) for index in missing] if partials else [],
                floor_version=floor_version,
            ),
        )

    # ---- back

    def group_of(
        self, worker: str, reply: Generated | GenerateFailed | PartialSample | ScoreRequest
    ) -> Group | None:
        """The group that this reply may change; None for a late, duplicate or foreign one."""
        key = reply.key
        group = self._state.groups.get(key.group_id)
        if group is None or group.state is not GroupState.RUNNING or group.worker != worker:
            return None
        if (key.epoch, key.attempt) != (self._state.epoch, group.attempt):
            return None
        return group if key.index in group.missing else None

    def fault(self, group: Group, sample: Sample) -> str:
        """What shows that no engine of ours can have sampled this; empty when nothing does."""
        if not len(sample.ids) == len(sample.logprobs) == len(sample.versions) > 0:
            return f"{len(sample.ids)} ids, {len(sample.logprobs)} logprobs, {len(sample.versions)} versions"
        if sample.newest_version == NOT_GENERATED:
            return "no token was generated"
        oldest, newest = sample.oldest_version, sample.newest_version
        if oldest < group.floor_version or newest > self._state.version:
            return f"versions {oldest} to {newest}, possible are {group.floor_version} to {self._state.version}"
        if not math.isfinite(sample.logprobs.sum()):
            return "logprobs that are not finite"
        return ""

    def unload(self, worker: str, count: int = 1) -> None:
        if server := self._fleet.rollout.get(worker):
            server.load -= count

    # ---- taken back

    def held_by(self, worker: str) -> list[Group]:
        return [g for g in self._running() if g.worker == worker]

    def overdue(self, now: float) -> list[Group]:
        return [g for g in self._running() if now > g.deadline]

    def release(self, group: Group) -> DropReason | None:
        """Ends a lease. The samples that are back stay, the others go to another server: None, or why they do not."""
        self.unload(group.worker, len(group.missing))
        self._state.record(LeaseFailed(group.group_id, group.worker))
        if len(group.failed_on) < self._settings.max_attempts:
            return None
        several = len(set(group.failed_on)) > 1  # then it is the prompt rather than a server
        return DropReason.POISON if several else DropReason.GENERATION_FAILED

    def _running(self) -> list[Group]:
        return [g for g in self._state.in_state(GroupState.RUNNING) if g.missing]
