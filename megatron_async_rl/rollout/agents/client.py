"""The connection settings of an agent. Imports nothing of the worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSettings:
    """The address of the policy and the key of one episode."""

    base_url: str  # of OpenAI's API; it ends in /v1
    api_key: str
    anthropic_base_url: str
    model: str

    def environment(self) -> dict[str, str]:
        """Returns the variables that OpenAI's and Anthropic's clients read."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
        }
