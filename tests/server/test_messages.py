"""Anthropic's API through its own client: `alignment` in messages, and errors of its classes."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from server.middleware.access import UNAUTHORIZED
from server.middleware.anthropic_errors import AnthropicErrorMiddleware
from server.middleware.drain import STOPPING
from tests.server.conftest import API_KEY, LIMITED_KEY, WAIT_SECONDS, Server

MESSAGES: Any = [{"role": "user", "content": "How do I look after my freezer?"}]
ALIGNED = {"alignment": {"proxy": "aligned"}}


def connect(server: Server, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_SECONDS
    )


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """It sends its key as X-Api-Key."""
    with connect(server, API_KEY) as client:
        yield client


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    options = {"model": "assent-demo", "max_tokens": 16, "messages": MESSAGES} | options
    return client.messages.create(**options)


def test_a_message_has_alignment(claude):
    message: Any = ask(claude, extra_body=ALIGNED)
    counts = message.alignment
    assert counts["proxy"] == "aligned" and len(counts["version"]) == 12
    assert counts["accepted"] + counts["forced"] == message.usage.output_tokens
    header = {"Assent-Alignment": json.dumps(ALIGNED["alignment"])}
    assert ask(claude, extra_headers=header).alignment["proposed"] > 0
    by_name = ask(claude, model="assent-demo:aligned")
    assert by_name.alignment == {key: counts[key] for key in ("proxy", "version")}
    assert not hasattr(ask(claude), "alignment")


def test_a_stream_has_it_at_its_ends(claude):
    options: Any = {"model": "assent-demo", "max_tokens": 16, "messages": MESSAGES}
    with claude.messages.stream(**options, extra_body=ALIGNED) as stream:
        events: Any = list(stream)
        final: Any = stream.get_final_message()
    (start,) = [event for event in events if event.type == "message_start"]
    (end,) = [event for event in events if event.type == "message_delta"]
    assert final.alignment == start.message.alignment
    assert {key: end.alignment[key] for key in final.alignment} == final.alignment
    assert end.alignment["accepted"] + end.alignment["forced"] == end.usage.output_tokens
    assert final.content[0].text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens must be positive"),
        ({"model": "other"}, anthropic.NotFoundError, "other"),
        ({"model": "assent-demo:stern"}, anthropic.NotFoundError, "aligned, polite"),
        ({"extra_body": {"aligment": {}}}, anthropic.BadRequestError, "did you mean"),
        ({"extra_body": {"alignment": {"best_of": 2}}}, anthropic.BadRequestError, "best_of"),
        ({"messages": MESSAGES * 200}, anthropic.BadRequestError, "maximum context length"),
    ],
)
def test_errors(claude, options, error, message):
    with pytest.raises(error, match=message) as raised:
        ask(claude, **options)
    body: Any = raised.value.body
    assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    assert body["error"]["type"] == kinds[raised.value.status_code]


def test_errors_before_the_route(server):
    with (
        connect(server, "sk-wrong") as stranger,
        pytest.raises(anthropic.AuthenticationError, match="X-Api-Key"),
    ):
        ask(stranger)
    with (
        connect(server, LIMITED_KEY) as limited,
        pytest.raises(anthropic.BadRequestError, match="max_prompt_tokens"),
    ):
        ask(limited, messages=[{"role": "user", "content": "a " * 60}])
    answer = httpx.get(f"{server.url}/v1/messages/none", headers={"X-Api-Key": API_KEY})
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"


def test_other_middleware_and_exceptions():
    """What keeps its headers, and what has no answer of its own."""

    async def broken(scope, receive, send):
        raise RuntimeError("a secret")

    async def post(app, path):
        transport = httpx.ASGITransport(AnthropicErrorMiddleware(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path)

    refused = asyncio.run(post(STOPPING, "/v1/messages"))
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "5"
    assert refused.json()["error"] == {"type": "overloaded_error", "message": STOPPING.message}
    counted = asyncio.run(post(UNAUTHORIZED, "/v1/messages/count_tokens"))
    assert counted.json()["error"]["type"] == "authentication_error"
    assert "code" in asyncio.run(post(UNAUTHORIZED, "/v1/responses")).json()["error"]
    failed = asyncio.run(post(broken, "/v1/messages"))
    assert failed.status_code == 500
    assert failed.json()["error"] == {"type": "api_error", "message": "Internal Server Error"}


def test_the_error_that_ends_a_stream():
    scope = {"type": "http", "path": "/v1/messages"}
    name, data = STOPPING.as_event(scope).decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"
    assert STOPPING.as_event(scope | {"path": "/v1/responses"}).startswith(b'data: {"error": {')
