"""The OpenAPI description of the endpoints is true, for requests that fit it and that do not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import schemathesis
from agent_endpoint import Served, serving
from char_tokenizer import make_chat_folder
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from megatron_async_rl.data.tokenizer import Tokenizer

NUM_EXAMPLES = 6  # of each path, and as many that do not fit the description
NUM_OPERATIONS = 6
TRUE = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@contextmanager
def serving_thread(folder: Path) -> Iterator[Served]:
    """Serves a session on a loop of its own, because schemathesis' client blocks."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    found: list[Served] = []
    ended = asyncio.Event()

    async def serve() -> None:
        async with serving(Tokenizer(folder), max_requests=10**6) as served:
            found.append(served)
            started.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def test_requests_are_answered_as_described_and_change_no_other_session(tmp_path: Path) -> None:
    with serving_thread(make_chat_folder(tmp_path / "model")) as served:
        other = served.another()
        schema = schemathesis.openapi.from_url(f"{served.endpoint.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == NUM_OPERATIONS
        key = {"Authorization": f"Bearer {served.session.key}"}
        http, statuses = requests.Session(), set()
        checks = CHECKS.get_by_names(TRUE)

        def check(case: Case) -> None:
            answer = case.call(headers=key, session=http)
            statuses.add(answer.status_code)
            case.validate_response(answer, checks=checks, headers=key)

        for operation in operations:
            modes = [GenerationMode.POSITIVE]
            modes += [GenerationMode.NEGATIVE] if operation.body else []
            for mode in modes:
                fuzz = given(operation.as_strategy(generation_mode=mode))(check)
                settings(
                    max_examples=NUM_EXAMPLES,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(fuzz)()
        assert {200, 400} <= statuses
        assert not other.transcript.turns and not other.num_requests and not other.rewards
        url = f"{served.endpoint.url}/v1/models"
        assert requests.get(url, headers={"x-api-key": other.key}, timeout=60).ok


@pytest.mark.parametrize("key", ["", "Bearer x", "Bearer \udce9"])
def test_description_needs_no_key_and_nothing_else_is_served_without(
    tmp_path: Path, key: str
) -> None:
    with serving_thread(make_chat_folder(tmp_path / "model")) as served:
        headers = {"Authorization": key.encode(errors="surrogateescape")} if key else {}
        url = served.endpoint.url
        described = requests.get(f"{url}/openapi.json", timeout=60).json()
        for path, operations in described["paths"].items():
            [method] = operations
            answer = requests.request(method, url + path, json={}, headers=headers, timeout=60)
            assert answer.status_code == 401, answer.text
