"""What a workflow asks the judges before its sample is whole: the core's part of it."""

from __future__ import annotations

import math

from test_core import LEASE_S, make_core, messages, serve

from megatron_async_rl.protocol.messages import Answer, Ask, Generate, GenerateFailed, Score, Scored


def ask(lease: Generate, index: int = 0, number: int = 1) -> Ask:
    return Ask(lease.epoch, lease.group_id, lease.attempt, index, number, "is it 2?")


def test_a_workflow_s_question_goes_to_a_judge_and_its_answer_back_and_changes_nothing_else() -> (
    None
):
    core = make_core()
    [lease, *_] = serve(core)
    core.reward_joined("reward-0", 1, 0)
    [question] = messages(core.asked("rollout-0", ask(lease), 1), Score)
    assert (question.response, question.row, question.number) == ("is it 2?", lease.prompt.row, 1)
    assert messages(core.asked("rollout-0", ask(lease, 1), 1), Score) == []  # the one judge is busy
    reply = Scored(1, lease.group_id, lease.attempt, 0, 0.5, number=1)
    actions = core.scored("reward-0", reply, 2)
    assert messages(actions, Answer) == [Answer(lease.group_id, lease.attempt, 0, 1, 0.5)]
    assert [score.index for score in messages(actions, Score)] == [1]  # free for the next
    assert core.groups[lease.group_id].rewards == [None] * len(lease.indices)
    assert (
        messages(core.scored("reward-0", reply, 3), Answer) == [] and core.num_fenced_messages == 1
    )


def test_a_question_without_an_answer_says_why() -> None:
    core = make_core()  # two attempts
    [lease, *_] = serve(core)
    core.reward_joined("reward-1", 1, 0)
    core.asked("rollout-0", ask(lease), 1)
    [again] = messages(core.worker_lost("reward-0", 2), Score)  # another judge is asked
    broken = Scored(1, lease.group_id, lease.attempt, 0, None, "it broke", number=again.number)
    [answer] = messages(core.scored("reward-1", broken, 3), Answer)
    assert answer.reward is None and answer.error == "it broke"
    assert core.fleet.reward["reward-1"].load == 0


def test_a_verdict_that_is_no_number_is_none() -> None:
    core = make_core()
    [lease, *_] = serve(core)
    core.asked("rollout-0", ask(lease), 1)
    nothing = Scored(1, lease.group_id, lease.attempt, 0, math.nan, number=1)
    assert messages(core.scored("reward-0", nothing, 2), Answer) == []  # asked once more
    [answer] = messages(core.scored("reward-0", nothing, 3), Answer)
    assert answer.reward is None and "nan" in answer.error


def test_a_question_ends_with_its_lease_and_its_judge_is_free_again() -> None:
    core = make_core(heartbeat_timeout_s=1e9)
    [lease, *_] = serve(core)
    core.asked("rollout-0", ask(lease), 1)
    [answer] = messages(core.tick(1 + LEASE_S + 1), Answer)
    assert "has ended" in answer.error
    assert core.fleet.reward["reward-0"].load == 0


def test_a_question_of_a_lease_that_has_ended_is_refused() -> None:
    core = make_core()
    [lease, *_] = serve(core)
    core.worker_lost("reward-0", 0)
    assert core.asked("rollout-0", ask(lease), 1) == []  # it waits for a judge
    core.generate_failed("rollout-0", GenerateFailed(1, lease.group_id, lease.attempt, 0, "no"), 2)
    [answer] = messages(core.reward_joined("reward-0", 1, 3), Answer)
    assert "has ended" in answer.error
    [answer] = messages(core.asked("rollout-0", ask(lease, number=2), 4), Answer)
    assert answer.number == 2 and "has ended" in answer.error and core.num_fenced_messages == 1
