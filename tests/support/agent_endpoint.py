"""The endpoint of agents with one session, on a policy that says given texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai

from megatron_async_rl.config.datasets import DataConfig
from megatron_async_rl.config.sections import SandboxConfig
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.errors import EngineError
from megatron_async_rl.protocol.types import Sample, Segment
from megatron_async_rl.rollout.agents.apis import chat
from megatron_async_rl.rollout.agents.client import ClientSettings
from megatron_async_rl.rollout.agents.server import Endpoint
from megatron_async_rl.rollout.agents.session import Session, SessionSettings
from megatron_async_rl.rollout.engine_client import Sampling
from megatron_async_rl.rollout.python_runner import PythonRunner
from megatron_async_rl.rollout.workflow import Completion

END = 0
CONTEXT_TOKENS = 4096


class ScriptedPolicy:
    """A policy that says given texts, two tokens per weight version."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.asked: list[list[int]] = []  # ids of each call
        self.fails = False
        self.gate = asyncio.Event()  # cleared, it holds all calls
        self.gate.set()
        self.num_cancelled = 0

    async def generate(self, ids: list[int], sampling: Sampling) -> Completion:
        self.asked.append(ids)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.fails:
            raise EngineError("the server died")
        if len(ids) >= CONTEXT_TOKENS:
            return Completion([], "length")
        text = self.texts.pop(0) if self.texts else "ok"
        sampled = [*self.tokenizer.encode(text).tolist(), END][: sampling.max_new_tokens]
        stop = "stop" if sampled[-1] == END else "length"
        pairs = [sampled[n : n + 2] for n in range(0, len(sampled), 2)]
        segments = [Segment(7 + n, pair, [-0.5] * len(pair)) for n, pair in enumerate(pairs)]
        return Completion(segments, stop)


class Served:
    """A session behind a running endpoint, with the policy that it talks to."""

    def __init__(
        self,
        endpoint: Endpoint,
        policy: ScriptedPolicy,
        max_requests: int,
        sandbox: SandboxConfig,
    ) -> None:
        self.policy, self.endpoint = policy, endpoint
        self._settings = SessionSettings(
            DataConfig(train="-"), max_requests, PythonRunner(sandbox, processes=1)
        )
        self.session = self.another()

    def another(self) -> Session:
        """Opens one more session, of the same policy."""
        session = Session(self.policy, Sampling(256, 1.0, [END]), self._settings)  # type: ignore[arg-type]
        self.endpoint.open(session)
        return session

    def client(self, session: Session) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.endpoint.url}/v1", api_key=session.key, max_retries=0
        )

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return self.client(self.session)

    def client_settings(self) -> ClientSettings:
        url = self.endpoint.url
        return ClientSettings(f"{url}/v1", self.session.key, url, chat.MODEL)

    @property
    def anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(
            base_url=self.endpoint.url, api_key=self.session.key, max_retries=0
        )

    async def chat(self, messages: list[Any], **options: Any) -> Any:
        return await self.openai.chat.completions.create(
            model="policy", messages=messages, **options
        )

    def sample(self) -> Sample:
        return self.session.transcript.sample("stop", self.session.rewards)


@asynccontextmanager
async def serving(
    tokenizer: Tokenizer,
    *texts: str,
    max_requests: int = 100,
    sandbox: SandboxConfig | None = None,
) -> AsyncIterator[Served]:
    endpoint = Endpoint("127.0.0.1")
    await endpoint.start()
    try:
        policy = ScriptedPolicy(tokenizer, list(texts))
        yield Served(endpoint, policy, max_requests, sandbox or SandboxConfig())
    finally:
        await endpoint.stop()
