"""Several attempts at one problem: a wrong answer is followed by feedback and another turn.

A sample that is solved in turn n has the reward score * discount^(n - 1), so fewer turns are worth
more (as `turn_level_discount` in AReaL's multi-turn example). All turns of it are trained with that
reward.
"""

from __future__ import annotations

from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.workflow import Episode, Policy
from megatron_async_rl.rollout.workflows import options

FEEDBACK = (
    "Your answer is wrong, or it has not the form that was asked for. "
    "Think again and give another answer in that form."
)


class MultiTurnMath:
    """Scores each turn but the last; `success` is the score of a right answer.

    In `feedback`, {prompt} stands for the row's prompt, if that is a text.
    """

    def __init__(
        self,
        max_turns: int = 3,
        discount: float = 0.9,
        feedback: str = FEEDBACK,
        success: float = 1.0,
    ) -> None:
        self._max_turns = options.integer("max_turns", max_turns, 1)
        self._discount = options.number("discount", discount, 0, 1)
        self._feedback = options.text("feedback", feedback)
        self._success = success

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        episode, discount = Episode(prompt.ids), 1.0
        for number in range(1, self._max_turns + 1):
            turn = await policy.generate(episode.ids, sampling)
            episode.add_turn(turn)
            text = policy.tokenizer.decode(turn.ids)
            episode.metrics["turns"] = number
            if number == self._max_turns or turn.stop == "length":
                break
            if await policy.score(text) >= self._success:
                break
            feedback = {"role": "user", "content": self._feedback_on(prompt)}
            context = policy.next_turn(prompt, turn, [feedback])
            if not episode.has_room(context, policy.config.model.context_tokens):
                return episode.sample("length", text, discount)
            episode.add_context(context)
            discount *= self._discount
        return episode.sample(turn.stop, text, discount)

    def _feedback_on(self, prompt: Prompt) -> str:
        question = prompt.row.get("prompt")
        if isinstance(question, str):
            return self._feedback.replace("{prompt}", question)
        return self._feedback
