"""The workflow of `rollout.agent` and `rollout.agent_command`: each sample is an episode of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import EngineError, HookFailed
from megatron_async_rl.protocol.types import Prompt, Sample
from megatron_async_rl.rollout.agents.apis import chat
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.runner import CommandRunner, FunctionRunner
from megatron_async_rl.rollout.agents.server import Endpoint
from megatron_async_rl.rollout.agents.session import Session, SessionSettings
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.workflow import Policy


class AgentWorkflow:
    """`log`: the output of agents is appended to it."""

    def __init__(self, config: Config, log: Path) -> None:
        rollout = config.rollout
        self._timeout_s = rollout.agent_timeout_s
        python = PythonRunner(config.sandbox)
        self._settings = SessionSettings(config.data, rollout.agent_max_requests, python)
        self._endpoint = Endpoint(rollout.agent_host)
        self._runner: FunctionRunner | CommandRunner
        if rollout.agent_command is not None:
            self._runner = CommandRunner(rollout.agent_command, log)
        else:
            assert rollout.agent is not None
            self._runner = FunctionRunner(rollout.agent, log)
        self._starting = asyncio.Lock()

    async def run(self, prompt: Prompt, policy: Policy, sampling: Sampling) -> Sample:
        """Raises HookFailed if the agent fails or misses its deadline, EngineError, SandboxError or
        SandboxLost if these fail, DataError if the agent makes no request."""
        async with self._starting:
            if not self._endpoint.port:
                await self._endpoint.start()
        session = Session(policy, sampling, self._settings)
        self._endpoint.open(session)
        try:
            async with asyncio.timeout(self._timeout_s):
                returned = await self._runner.run(prompt.row, self._client(session))
        except TimeoutError:
            raise session.error or HookFailed(
                f"the agent did not end within rollout.agent_timeout_s = {self._timeout_s:g}",
                "raise it if episodes take longer",
            ) from None
        except HookFailed as e:
            raise session.error or e from None
        except asyncio.CancelledError:  # the worker ends, or has lost its lease
            session.error = session.error or EngineError("its rollout worker has ended the episode")
            raise
        finally:
            self._endpoint.close(session)
        if session.error:
            raise session.error
        turns = session.transcript.turns
        stop = turns[-1].completion.stop if turns else "stop"
        session.rewards.give(returned, len(turns))
        return session.transcript.sample(stop, session.rewards)

    async def stop(self) -> None:
        """Answers the requests in flight, and ends all agents."""
        await self._endpoint.stop()
        await self._runner.stop()

    def _client(self, session: Session) -> ClientSettings:
        url = self._endpoint.url
        return ClientSettings(f"{url}/v1", session.key, url, chat.MODEL)
