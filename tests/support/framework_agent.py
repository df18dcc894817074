"""An agent of the framework smolagents; its import takes seconds."""

from __future__ import annotations

import smolagents
from smolagents import tool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES


def calculator(max_steps: int, max_tokens: int) -> smolagents.ToolCallingAgent:
    """Returns an agent of the framework, which finds its server in the environment."""
    return smolagents.ToolCallingAgent(
        tools=[add],
        model=smolagents.OpenAIServerModel("policy", max_tokens=max_tokens),
        prompt_templates=EMPTY_PROMPT_TEMPLATES,
        max_steps=max_steps,
        verbosity_level=0,
    )


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: a number
        b: a number
    """
    return a + b
