"""The HTTP server of a rollout worker's agents: finds the session by its key, answers its requests.

Every key is made for one sample and is valid while its episode runs. A request with another key
gets 401 and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from aiohttp import web

from megatron_async_rl.observability.error_log import ErrorLog, user_error
from megatron_async_rl.rollout.agents.apis import anthropic, chat, openapi, responses
from megatron_async_rl.rollout.agents.apis.fields import read_json
from megatron_async_rl.rollout.agents.apis.request import RequestError
from megatron_async_rl.rollout.agents.session import Session

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 << 20

Answer = dict[str, Any] | list[Any]  # a whole reply, or the events of a streamed one
Handler = Callable[[Session, dict[str, Any]], Coroutine[Any, Any, Answer]]


class Endpoint:
    def __init__(self, host: str) -> None:
        self._host = host
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}
        self._runner: web.AppRunner | None = None
        self._errors = ErrorLog(logger)
        self.port = 0

    @property
    def url(self) -> str:
        """The address without `/v1`, as for ANTHROPIC_BASE_URL."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listens on a free port of the address rollout.agent_host."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._answer_errors])
        handlers: dict[str, Handler] = {
            "/v1/chat/completions": _chat,
            "/v1/completions": _completion,
            "/v1/responses": _response,
            "/v1/messages": _message,
            "/v1/reward": _reward,
        }
        for path, handler in handlers.items():
            app.router.add_post(path, self._route(handler))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/openapi.json", _describe)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=1.0,
            handler_cancellation=True,  # a disconnected client ends its request
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    def open(self, session: Session) -> None:
        self._sessions[session.key] = session
        self._tasks[session.key] = set()

    def close(self, session: Session) -> None:
        """Ends a session: its key is no longer valid, and its requests in flight are cancelled."""
        del self._sessions[session.key]
        for task in self._tasks.pop(session.key):
            task.cancel()

    # ---- inside

    def _route(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._session(request)  # before a body without a valid key is read
            body = _read_object(await request.read())
            session = self._session(request)  # which may have ended meanwhile
            task = asyncio.create_task(handler(session, body))
            self._tasks[session.key].add(task)
            try:
                answer = await task
            except asyncio.CancelledError:
                if session.key in self._sessions:
                    task.cancel()  # the client has closed the connection
                    raise
                if session.error:
                    raise session.fail(session.error) from None
                raise RequestError(401, "the episode has ended", "authentication_error") from None
            finally:
                self._tasks.get(session.key, set()).discard(task)
            if isinstance(answer, list):
                return await _send_events(request, answer)
            return web.json_response(answer)

        return handle

    def _session(self, request: web.Request) -> Session:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        key = key or request.headers.get("x-api-key", "")
        for known, session in self._sessions.items():
            if secrets.compare_digest(known.encode(), key.encode(errors="surrogateescape")):
                return session
        raise RequestError(
            401, "the key is unknown, or its episode has ended", "authentication_error"
        )

    async def _models(self, request: web.Request) -> web.Response:
        self._session(request)
        model = {
            "id": chat.MODEL,
            "object": "model",
            "created": chat.CREATED,
            "owned_by": "megatron_async_rl",
        }
        return web.json_response({"object": "list", "data": [model]})

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as e:
            return _error(request, e)
        except RecursionError:  # while it was read, rendered or written
            return _error(request, RequestError(400, "the body is nested too deeply: flatten it"))
        except web.HTTPNotFound:
            served = ", ".join(openapi.description()["paths"])
            error = RequestError(404, f"{request.path} is not served, only {served}")
            return _error(request, error)
        except web.HTTPException as e:
            return _error(request, RequestError(e.status, e.reason))
        except Exception as e:  # a bug here: the client gets a JSON error, the log the rest
            self._errors.log(f"a request to {request.path} failed", user_error(e))
            return _error(request, RequestError(500, f"{type(e).__name__}: {e}", "api_error"))


async def _describe(_: web.Request) -> web.Response:
    return web.json_response(openapi.description())


def _read_object(data: bytes) -> dict[str, Any]:
    try:
        body = read_json(data)
    except ValueError:
        raise RequestError(400, "the body is not JSON in Unicode") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    return body


async def _chat(session: Session, body: dict[str, Any]) -> Answer:
    request = chat.parse_chat(body)
    replies = await session.complete(request)
    if request.stream:
        return [*chat.chat_chunks(request, replies, session.tokenizer), "[DONE]"]
    return chat.chat_completion(request, replies, session.tokenizer)


async def _completion(session: Session, body: dict[str, Any]) -> Answer:
    request = chat.parse_completion(body)
    whole = chat.completion(request, await session.complete(request), session.tokenizer)
    return [whole, "[DONE]"] if request.stream else whole


async def _response(session: Session, body: dict[str, Any]) -> Answer:
    request = responses.parse(body, session)
    [reply] = await session.complete(request)
    whole = responses.response(body, request, reply, session)
    return responses.events(whole) if request.stream else whole


async def _message(session: Session, body: dict[str, Any]) -> Answer:
    request = anthropic.parse_messages(body)
    [reply] = await session.complete(request)
    return anthropic.events(reply) if request.stream else anthropic.message(reply)


async def _reward(session: Session, body: dict[str, Any]) -> Answer:
    """Takes the reward of a turn, by default of the last one: {"reward": number, "turn": 0}."""
    return session.rewards.post(body, len(session.transcript.turns))


async def _send_events(request: web.Request, stream: list[Any]) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    for event in stream:
        text = event if isinstance(event, str) else json.dumps(event)
        named = f"event: {event['type']}\n" if isinstance(event, dict) and "type" in event else ""
        await response.write(f"{named}data: {text}\n\n".encode())
    await response.write_eof()
    return response


def _error(request: web.Request, error: RequestError) -> web.Response:
    """Returns the error in the form of the API that was called."""
    body: dict[str, Any] = {"error": {"message": error.message, "type": error.kind}}
    if request.path == "/v1/messages":
        body["type"] = "error"
    else:
        body["error"]["code"] = error.status
    return web.json_response(body, status=error.status)
