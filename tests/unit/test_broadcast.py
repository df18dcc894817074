"""Weight updates over the network, with fake sources and servers that speak the real messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from megatron_async_rl.controller.weight_sync.broadcast import BroadcastPublisher
from megatron_async_rl.controller.weight_sync.session import Outcome, UpdateSession
from megatron_async_rl.errors import PublishError
from megatron_async_rl.protocol.messages import Message
from megatron_async_rl.protocol.weight_messages import (
    AbandonUpdate,
    Bucket,
    BucketsSent,
    GroupJoined,
    GroupOpened,
    JoinGroup,
    OpenGroup,
    Published,
    PublishOffer,
    ReceiveBuckets,
    SendBuckets,
    TensorSpec,
    Updated,
    UpdateReady,
    UpdateWeights,
    WeightDigests,
)

BUCKETS = [Bucket([TensorSpec("a", "float32", [2])])]
Answer = Callable[[str, Message], Message | None]


@dataclass
class Cluster:
    """Answers every message like a healthy peer; `faults` by (name, message class) replace that."""

    faults: dict[tuple[str, type], Answer] = field(default_factory=dict)
    log: list[tuple[str, Message]] = field(default_factory=list)
    num_stages: int = 1
    timeout_s: float = 0.3
    verify_every: int = 1

    def __post_init__(self) -> None:
        self.session = UpdateSession(self.send, self.timeout_s)
        self.publisher = BroadcastPublisher(self.session, 1, self.verify_every)

    async def send(self, name: str, message: Message) -> None:
        self.log.append((name, message))
        fault = self.faults.get((name, type(message)))
        answer = fault(name, message) if fault else self.answer(name, message)
        if answer is not None:
            self.session.inbox.put_nowait((name, answer))

    def answer(self, name: str, message: Message) -> Message | None:
        if isinstance(message, UpdateWeights):
            return UpdateReady(message.version, {"interrupt": 0.01})
        if isinstance(message, OpenGroup):
            self.session.inbox.put_nowait((name, GroupOpened(message.group, 0, "127.0.0.1", 1)))
            return GroupJoined(message.group)
        if isinstance(message, JoinGroup):
            return GroupJoined(message.group)
        if isinstance(message, SendBuckets):
            return BucketsSent(message.version, 0, {f"digest of {name}": "1"}, {"wire": 0.02})
        if isinstance(message, AbandonUpdate):
            return UpdateReady(message.version, {})
        if isinstance(message, WeightDigests):
            return Updated(message.version, {"load": 0.03}, num_interrupted=2)
        return None

    def publish(self, version: int, *servers: str) -> Outcome:
        offers = {
            f"trainer-{s}": PublishOffer(version, s, self.num_stages, BUCKETS, "gloo")
            for s in range(self.num_stages)
        }
        return asyncio.run(self.publisher.publish(version, offers, list(servers)))

    def sent(self, kind: type, name: str | None = None) -> list[Message]:
        return [
            message for to, message in self.log if isinstance(message, kind) and name in (None, to)
        ]


def test_all_servers_update_and_sources_are_released() -> None:
    cluster = Cluster(num_stages=2)
    outcome = cluster.publish(3, "rollout-0", "rollout-1")
    assert outcome.serving == ["rollout-0", "rollout-1"] and not outcome.fenced
    assert outcome.num_interrupted == 4
    assert {"interrupt", "wire", "load", "total"} <= outcome.seconds.keys()
    [receive, _] = cluster.sent(ReceiveBuckets)
    assert [stage.group for stage in receive.stages] == ["weights-1-source0", "weights-1-source1"]
    [digests, _] = cluster.sent(WeightDigests)
    assert digests.digests == {"digest of trainer-0": "1", "digest of trainer-1": "1"}
    assert cluster.sent(Published) == [Published(3, 2)] * 2


def test_group_ranks_are_the_source_then_the_servers() -> None:
    cluster = Cluster()
    cluster.publish(0, "rollout-0", "rollout-1")
    assert [(j.rank_offset, j.world_size) for j in cluster.sent(JoinGroup)] == [(1, 3), (2, 3)]


def test_groups_are_reused_while_membership_is_unchanged() -> None:
    cluster = Cluster()
    cluster.publish(0, "rollout-0")
    cluster.publish(1, "rollout-0")
    assert len(cluster.sent(OpenGroup)) == 1
    cluster.publish(2, "rollout-0", "rollout-1")
    assert len(cluster.sent(OpenGroup)) == 2


def test_digests_are_compared_every_kth_update_and_in_new_groups() -> None:
    cluster = Cluster(verify_every=3)

    def verified(version: int, *servers: str) -> bool:
        seen = len(cluster.sent(ReceiveBuckets))
        cluster.publish(version, *servers)
        [word] = {message.verify for message in cluster.sent(ReceiveBuckets)[seen:]}
        return word

    assert [verified(version, "rollout-0") for version in range(4)] == [True, False, False, True]
    assert verified(4, "rollout-0", "rollout-1")  # one more server
    assert not verified(5, "rollout-0", "rollout-1")
    assert verified(6, "rollout-0", "rollout-1")  # the third after the fourth
    cluster.publisher.forget_groups()  # the trainer was restarted
    assert verified(7, "rollout-0", "rollout-1")


def test_second_attempt_after_a_broken_broadcast_is_verified() -> None:
    cluster = Cluster(verify_every=100)
    cluster.publish(0, "rollout-0")
    broken = iter([True])

    def send(name: str, message: Message) -> Message:
        return BucketsSent(1, 0, {}, {}, "connection closed" if next(broken, False) else "")

    cluster.faults[("trainer-0", SendBuckets)] = send
    cluster.faults[("rollout-0", ReceiveBuckets)] = lambda name, message: (
        Updated(1, {}, error="connection closed") if len(cluster.sent(SendBuckets)) == 1 else None
    )
    assert cluster.publish(1, "rollout-0").serving == ["rollout-0"]
    assert [message.verify for message in cluster.sent(ReceiveBuckets)] == [True, False, True]
    assert [message.verify for message in cluster.sent(SendBuckets)] == [True, False, True]


@pytest.mark.parametrize("kind", [UpdateWeights, JoinGroup, WeightDigests])
def test_silent_server_is_fenced_and_others_continue(kind: type) -> None:
    cluster = Cluster(faults={("rollout-1", kind): lambda name, message: None})
    outcome = cluster.publish(0, "rollout-0", "rollout-1")
    assert outcome.serving == ["rollout-0"]
    assert "within weights.update_timeout_s" in outcome.fenced["rollout-1"]
    assert not cluster.sent(ReceiveBuckets, "rollout-1") or kind is WeightDigests


LOST_AT = [UpdateWeights, OpenGroup, JoinGroup, SendBuckets, AbandonUpdate, WeightDigests]


@pytest.mark.parametrize("kind", LOST_AT)
def test_lost_server_is_not_awaited_and_rejoins_the_next_update(
    kind: type,
) -> None:
    cluster = Cluster(timeout_s=30.0)
    at_source = kind in (OpenGroup, SendBuckets)  # it is lost while the source is awaited
    lost: list[int] = []  # numbers of messages sent until then

    def lose() -> None:
        lost.append(len(cluster.log))
        cluster.session.lost("rollout-1")

    def loses(name: str, message: Message) -> Message | None:
        if at_source:
            if not lost:
                lose()
            return cluster.answer(name, message)
        asyncio.get_running_loop().call_later(0.05, lose)
        return None

    def breaks(name: str, message: Message) -> Message | None:
        error = "" if lost else "connection closed"
        return BucketsSent(0, 0, {}, {}, error)

    cluster.faults[("trainer-0" if at_source else "rollout-1", kind)] = loses
    if kind is AbandonUpdate:  # it is stuck in a broken broadcast
        cluster.faults[("trainer-0", SendBuckets)] = breaks
    elif kind is JoinGroup:  # a peer that waits for it in the group fails when the others do

        def gives_up(name: str, message: Message) -> Message | None:
            error = "" if len(cluster.sent(OpenGroup)) > 1 else "the group is not full"
            asyncio.get_running_loop().call_later(
                0.1,
                cluster.session.inbox.put_nowait,
                ("rollout-0", GroupJoined(message.group, error)),
            )
            return None

        cluster.faults[("rollout-0", JoinGroup)] = gives_up
    started = time.monotonic()
    outcome = cluster.publish(0, "rollout-0", "rollout-1")
    assert time.monotonic() - started < 12.0  # half of update_timeout_s is 15
    assert outcome.serving == ["rollout-0"]
    assert list(outcome.fenced) == ["rollout-1"] and "lost during" in outcome.fenced["rollout-1"]
    [at] = lost
    # its next incarnation may have the name
    assert "rollout-1" not in [name for name, _ in cluster.log[at:]]
    assert kind is not OpenGroup or [join.world_size for join in cluster.sent(JoinGroup)] == [2]
    cluster.faults.clear()
    cluster.publisher.forget_worker("rollout-1")
    assert cluster.publish(1, "rollout-0", "rollout-1").serving == ["rollout-0", "rollout-1"]


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_sources_are_told_to_stop_as_soon_as_a_server_fails(how: str) -> None:
    """NCCL shows a source nothing: without a word it would wait for half of update_timeout_s."""
    cluster = Cluster(timeout_s=30.0, num_stages=2)

    def sends(name: str, message: Message) -> Message | None:
        if len(cluster.sent(SendBuckets)) > 2:  # the second attempt
            return cluster.answer(name, message)
        if name == "trainer-0":
            return cluster.answer(name, message)  # it has nothing left to send
        if how == "lost":
            cluster.session.lost("rollout-1")
            return None
        cluster.session.inbox.put_nowait(("rollout-1", Updated(0, {}, error="out of memory")))
        return None

    def stops(name: str, message: Message) -> Message | None:
        if name.startswith("trainer"):
            return BucketsSent(0, 1, {}, {}, "the controller ended this attempt")
        return cluster.answer(name, message)

    cluster.faults |= {(f"trainer-{stage}", SendBuckets): sends for stage in (0, 1)}
    cluster.faults |= {(f"trainer-{stage}", AbandonUpdate): stops for stage in (0, 1)}
    started = time.monotonic()
    outcome = cluster.publish(0, "rollout-0", "rollout-1")
    assert time.monotonic() - started < 12.0  # half of update_timeout_s is 15
    assert cluster.sent(AbandonUpdate, "trainer-1") == [AbandonUpdate(0)]
    assert not cluster.sent(AbandonUpdate, "trainer-0")  # it had answered
    assert "rollout-0" in outcome.serving and len(cluster.sent(OpenGroup)) == 4
    assert ("rollout-1" in outcome.serving) == (how == "failed")  # which is forgiven once


def test_lost_server_outside_update_is_ignored() -> None:
    cluster = Cluster()
    cluster.session.lost("rollout-0")
    cluster.publish(0, "rollout-0")
    cluster.session.lost("rollout-0")
    cluster.faults[("trainer-0", SendBuckets)] = lambda name, message: (
        cluster.session.lost("rollout-1"),
        cluster.answer(name, message),
    )[1]
    outcome = cluster.publish(1, "rollout-0")
    assert outcome.serving == ["rollout-0"] and not outcome.fenced


def test_server_with_wrong_digest_is_fenced_with_the_tensor_name() -> None:
    def mismatch(name: str, message: Message) -> Message:
        return Updated(0, {}, error="tensor model.norm.weight in the engine digests to 1")

    cluster = Cluster(faults={("rollout-0", WeightDigests): mismatch})
    outcome = cluster.publish(0, "rollout-0", "rollout-1")
    assert outcome.serving == ["rollout-1"]
    assert "model.norm.weight" in outcome.fenced["rollout-0"]


@pytest.mark.parametrize("dead", [True, False])
def test_responsive_servers_get_one_second_attempt(
    dead: bool,
) -> None:
    broken = iter([True])

    def send(name: str, message: Message) -> Message:
        error = "connection closed" if next(broken, False) else ""
        return BucketsSent(0, 0, {} if error else {"a": "1"}, {}, error)

    cluster = Cluster()
    cluster.faults[("trainer-0", SendBuckets)] = send

    def receive(name: str, message: Message) -> Message | None:
        first = len(cluster.sent(SendBuckets)) == 0
        return (
            Updated(0, {}, error="engine died") if first or (dead and name == "rollout-1") else None
        )

    cluster.faults |= {(name, ReceiveBuckets): receive for name in ("rollout-0", "rollout-1")}
    outcome = cluster.publish(0, "rollout-0", "rollout-1")
    assert outcome.serving == (["rollout-0"] if dead else ["rollout-0", "rollout-1"])
    assert outcome.fenced == ({"rollout-1": "engine died"} if dead else {})
    assert len(cluster.sent(OpenGroup)) == 2


def test_broadcast_that_always_fails_raises() -> None:
    cluster = Cluster()
    cluster.faults[("trainer-0", SendBuckets)] = lambda name, message: BucketsSent(
        0, 0, {}, {}, "no network"
    )
    cluster.faults |= {
        (name, ReceiveBuckets): lambda name, message: Updated(0, {}, error="no network")
        for name in ("rollout-0", "rollout-1")
    }
    with pytest.raises(PublishError, match="no network"):
        cluster.publish(0, "rollout-0", "rollout-1")
    assert len(cluster.sent(OpenGroup)) == 2


def test_update_without_servers_raises_and_releases_sources() -> None:
    cluster = Cluster(
        faults={
            ("rollout-0", JoinGroup): lambda name, message: GroupJoined(message.group, "refused")
        }
    )
    with pytest.raises(PublishError, match="refused"):
        cluster.publish(0, "rollout-0")
    assert cluster.sent(Published) == [Published(0, 0)]


@pytest.mark.parametrize("kind", [OpenGroup, SendBuckets])
def test_silent_source_ends_the_update_and_all_sources_are_released(kind: type) -> None:
    cluster = Cluster(num_stages=2)
    cluster.publish(0, "rollout-0")
    cluster.log.clear()
    cluster.faults[("trainer-1", kind)] = lambda name, message: None
    with pytest.raises(PublishError, match="trainer-1"):
        cluster.publish(1, "rollout-0", "rollout-1")
    assert cluster.sent(Published) == [Published(1, 0)] * 2
    cluster.faults.clear()
    assert cluster.publish(2, "rollout-0").serving == ["rollout-0"]  # in new groups
    assert len(cluster.sent(OpenGroup)) == 4


def test_reply_of_an_earlier_update_is_ignored() -> None:
    cluster = Cluster()
    cluster.session.inbox.put_nowait(("rollout-0", Updated(6, {}, error="old trouble")))
    cluster.session.inbox.put_nowait(("rollout-0", UpdateReady(6, {})))
    assert cluster.publish(7, "rollout-0").serving == ["rollout-0"]
