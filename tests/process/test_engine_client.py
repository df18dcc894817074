"""The SGLang client against a fake server that answers like each supported version.

The answers of the fake were recorded from real servers; tests/system/test_loop.py drives a real
0.5.21 through the same client.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from megatron_async_rl.errors import EngineError
from megatron_async_rl.protocol.weight_messages import Bucket, TensorSpec
from megatron_async_rl.rollout import engine_client as client_module
from megatron_async_rl.rollout.engine_client import EngineClient, Sampling

BUCKET = Bucket([TensorSpec("model.norm.weight", "bfloat16", [4])])


@dataclass
class FakeSGLang:
    """Imitates keys, sessions and replies of SGLang `version`; /generate answers with `reply`."""

    version: str
    reply: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    in_session: bool = False

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self.check])
        for path in ("server_info", "model_info"):
            application.router.add_get(f"/{path}", getattr(self, path))
        for path in (
            "generate",
            "begin_weight_update",
            "update_weights_from_distributed",
            "end_weight_update",
        ):
            application.router.add_post(f"/{path}", getattr(self, path))
        return application

    @web.middleware
    async def check(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.Response:
        key = "api" if request.path in ("/generate", "/server_info", "/model_info") else "admin"
        if request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        self.calls.append((request.path, await request.json() if request.can_read_body else None))
        return await handler(request)

    @property
    def has_sessions(self) -> bool:
        return self.version >= "0.5.21"

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "7"})

    async def generate(self, request: web.Request) -> web.Response:
        return web.json_response(self.reply)

    async def begin_weight_update(self, request: web.Request) -> web.Response:
        if not self.has_sessions:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.in_session = True
        return web.json_response({"success": True, "message": ""})

    async def update_weights_from_distributed(self, request: web.Request) -> web.Response:
        if self.has_sessions and not self.in_session:
            return web.json_response(
                {"success": False, "message": "begin_weight_update first"}, status=400
            )
        return web.json_response({"success": True, "message": "ok"})

    async def end_weight_update(self, request: web.Request) -> web.Response:
        self.in_session = False
        return web.json_response(
            {"success": True, "message": ""}, status=200 if self.has_sessions else 404
        )


def reply(
    ids: list[int],
    spans: list[dict[str, Any]] | None,
    finish: dict[str, Any] | None = None,
    **meta: Any,
) -> dict[str, Any]:
    spans_meta = {} if spans is None else {"weight_versions": spans}
    scored = [[-0.5, token, None] for token in ids]
    finish = finish or {"type": "stop", "matched": 0}
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": finish,
            "weight_version": "7",
            "output_token_logprobs": scored,
            **spans_meta,
            **meta,
        },
    }


def talk(
    fake: FakeSGLang, conversation: Callable[[EngineClient], Awaitable[Any]], api_key: str = "api"
) -> Any:
    async def run() -> Any:
        runner = web.AppRunner(fake.application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = EngineClient(f"http://127.0.0.1:{port}", api_key, "admin", 60.0, 60.0)
        try:
            await client.connect()
            return await conversation(client)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(run())


def generate(client: EngineClient) -> Awaitable[Any]:
    return client.generate([1, 2], Sampling(8, 1.0, [0]))


@pytest.mark.parametrize("version", ["0.5.18", "0.5.21", "0.5.23"])
def test_tokens_carry_the_versions_of_the_reply(version: str) -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}]
    part = talk(FakeSGLang(version, reply([5, 6, 0], spans)), generate)
    assert [(s.version, s.ids, s.logprobs) for s in part.segments] == [
        (3, [5, 6], [-0.5] * 2),
        (4, [0], [-0.5]),
    ]
    assert part.stop == "stop"


@pytest.mark.parametrize("version", ["0.5.16", "0.5.17", "0.5.17.post1"])
def test_reply_without_spans_labels_all_tokens_with_one_version(version: str) -> None:
    part = talk(FakeSGLang(version, reply([5, 6], None, {"type": "length", "length": 2})), generate)
    assert [(segment.version, segment.ids) for segment in part.segments] == [(7, [5, 6])]


@pytest.mark.parametrize(
    "finish",
    [
        {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None},
        {"type": "abort", "message": "Abort in waiting queue"},
    ],
)
def test_aborted_request_returns_its_tokens(finish: dict[str, Any]) -> None:
    part = talk(
        FakeSGLang("0.5.21", reply([5], [{"version": "3", "start": 0, "end": 1}], finish)), generate
    )
    assert part.stop == "abort" and part.segments[0].ids == [5]
    nothing = talk(
        FakeSGLang("0.5.21", reply([], [{"version": "3", "start": 0, "end": 0}], finish)), generate
    )
    assert nothing.stop == "abort" and nothing.segments == []


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (reply([5, 6], [{"version": "3", "start": 0, "end": 1}]), "do not cover its 2 tokens"),
        (reply([5, 6], [{"version": "3", "start": 1, "end": 2}]), "do not cover its 2 tokens"),
        (
            reply([5], None, output_token_logprobs=[[-0.5, 9, None]], weight_versions=[]),
            "1 tokens, but logprobs of 1 others",
        ),
        (
            reply([], [], {"type": "abort", "message": "too long", "status_code": 400}),
            "refused a request: too long",
        ),
    ],
)
def test_inconsistent_reply_is_refused(answer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        talk(FakeSGLang("0.5.21", answer), generate)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.20", "0.5.21", "0.5.23"])
def test_update_opens_a_session_where_the_server_has_sessions(version: str) -> None:
    async def update(client: EngineClient) -> str:
        await client.begin_update()
        await client.receive_bucket("g", BUCKET, True, None)
        await client.receive_bucket("g", BUCKET, True, 7)
        await client.end_update()
        return await client.served_version()

    fake = FakeSGLang(version)
    assert talk(fake, update) == "7"
    assert ("/begin_weight_update" in [path for path, _ in fake.calls]) == fake.has_sessions
    updates = [body for path, body in fake.calls if path == "/update_weights_from_distributed"]
    assert [body.get("weight_version") for body in updates] == [
        None,
        "7",
    ]  # the server records it per call: only the last call names it
    assert {body["load_format"] for body in updates} == {"flattened_bucket"}


@pytest.mark.parametrize("version", ["0.5.15", "0.5.24", "0.6.0"])
def test_unsupported_server_version_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(EngineError, match=r"0\.5\.16 to 0\.5\.23"):
        talk(FakeSGLang(version), generate)


def test_wrong_key_raises_with_the_server_message() -> None:
    with pytest.raises(EngineError, match=r"401.*Unauthorized"):
        talk(FakeSGLang("0.5.21"), generate, api_key="wrong")


def test_silent_server_raises_within_the_deadline() -> None:
    async def run() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: asyncio.sleep(30), "127.0.0.1", 0
        )
        client = EngineClient(
            f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "a", "b", 0.3, 0.3
        )
        try:
            await client.connect()
        finally:
            await client.close()
            server.close()

    with pytest.raises(EngineError, match="did not answer within"):
        asyncio.run(run())


def test_connection_closed_by_the_server_is_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang closes a connection that was idle for 5 s.

    A client with a blocked event loop has not noticed it.
    """
    monkeypatch.setattr(client_module, "KEEP_ALIVE_S", 0.2)
    fake = FakeSGLang("0.5.21", reply([5], [{"version": "3", "start": 0, "end": 1}]))
    runner = web.AppRunner(fake.application(), keepalive_timeout=0.3)

    async def serve() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    async def run(port: int) -> None:
        client = EngineClient(f"http://127.0.0.1:{port}", "api", "admin", 60.0, 60.0)
        try:
            await client.connect()
            await generate(client)
            time.sleep(1.0)  # noqa: ASYNC251 (blocks the client's event loop on purpose)
            await generate(client)
        finally:
            await client.close()

    server = asyncio.new_event_loop()  # in another thread, so that it is not blocked
    thread = threading.Thread(target=server.run_forever)
    thread.start()
    try:
        asyncio.run(run(asyncio.run_coroutine_threadsafe(serve(), server).result(60)))
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), server).result(60)
        server.call_soon_threadsafe(server.stop)
        thread.join()
        server.close()
