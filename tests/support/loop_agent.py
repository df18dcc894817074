"""An agent for whole runs that knows nothing of the project: it uses OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai

NUM_TURNS = 3


def asks_again(row: dict[str, Any], client: Any) -> float:
    """Converses for three turns; every third row then asks from the start, which is a branch.

    The reward is the fraction of even digits in all answers.
    """
    policy, answers = openai.OpenAI(max_retries=0), []

    def ask(messages: list[dict[str, str]]) -> str:
        reply = policy.chat.completions.create(
            model="policy", messages=messages, max_completion_tokens=24
        )
        answers.append(reply.choices[0].message.content or "")
        return answers[-1]

    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(NUM_TURNS):
        messages.append({"role": "assistant", "content": ask(messages)})
        messages.append({"role": "user", "content": "no,1+1="})
    if int(row["answer"]) % 3 == 0:
        ask([{"role": "user", "content": "again:" + row["prompt"]}])
    digits = [int(character) for character in "".join(answers) if character.isdigit()]
    return sum(digit % 2 == 0 for digit in digits) / len(digits) if digits else 0.0


def crashes(row: dict[str, Any], client: Any) -> float:
    raise RuntimeError("the agent of the user")
