"""The agent of agent.yaml, with OpenAI's client alone: solves a sum, and tries again if wrong."""

from typing import Any

import openai


def solve(row: dict[str, Any], client: Any) -> float:
    """Returns the reward: 1 for a right first answer, 0.8 for a right second one, else 0."""
    policy = openai.OpenAI()
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    for reward in (1.0, 0.8):
        reply = policy.chat.completions.create(model=client.model, messages=messages)
        answer = reply.choices[0].message
        if answer.content == f"\\boxed{{{row['answer']}}}":
            return reward
        messages += [answer, {"role": "user", "content": "Wrong."}]
    return 0.0
