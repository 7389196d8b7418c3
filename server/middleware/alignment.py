"""Admits every JSON request, whichever of vLLM's routes it is for, before the route sees it.

    body ──► AlignmentMiddleware ──► vLLM's route and handler ──► engine.generate ──► tokens
              │ admits, pins                                       ▲ adds the proxy (`engine_wrapper`)
              └───────────── AdmittedRequest (a context variable) ─┘

`admission.admit` takes the proxy and `alignment` out of the JSON body. The admitted request is kept in a context
variable while the app answers, and the proxies' versions stay pinned until the response has ended: sent, failed or
abandoned by the client. `admission` refuses what it cannot honour, so a new route of vLLM's never drops a proxy.

The request header `Assent-Alignment` may take the place of the body's `alignment`. The response header `Assent-Proxy`
names the proxy and its version, of several `a+b@<version of a>+<version of b>`.
"""

import asyncio
import json
from collections import defaultdict
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.request import EXTRA_ARGS_KEY
from server.access import CALLER
from server.admission import (
    RESPONSES,
    Admission,
    AdmittedRequest,
    admit,
    read_fields,
)
from server.alignment_field import ALIGNMENT_HEADER
from server.answers import named_version
from server.app_state import AppState
from server.body_shape import check_responses_items, check_shape, check_text
from server.engine import VLLMNotFoundError, VLLMValidationError, create_error_response
from server.engine_wrapper import CURRENT_REQUEST
from server.middleware import route_path
from server.middleware.request_log import ADMITTED, BODY, TEXTS
from server.proxy_choice import load_own_proxies

PROXY_HEADER = "Assent-Proxy"

_FLUSH_SECONDS = 2.0
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class AlignmentMiddleware:
    """ASGI middleware; must come after the one that finds the caller."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if "path" in scope else ""
        if scope["type"] == "http" and path == "/metrics":
            await _flush_metrics(scope["app"].state.assent)
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if Headers(scope=scope).get("content-type", "").startswith(_FORMS):
            return await self.app(scope, receive, send)
        content = await _read_body(receive)
        if content is None:  # the client has disconnected
            return
        body = _parse(content)
        if body is None:  # the route reports what is wrong with it
            return await self.app(scope, _replay(content, receive), send)

        state: AppState = scope["app"].state.assent
        model, has_alignment = body.get("model"), EXTRA_ARGS_KEY in body
        try:
            check_text(content, body)
            read_fields(path, body, Headers(scope=scope).get(ALIGNMENT_HEADER))
            check_shape(body)
            if path == RESPONSES:
                check_responses_items(body)
            await load_own_proxies(body, state, scope[CALLER])
            admitted = scope[ADMITTED] = admit(path, body, state, scope[CALLER])
        except (VLLMNotFoundError, VLLMValidationError) as error:
            answer = create_error_response(error)
            response = JSONResponse(answer.model_dump(), status_code=answer.error.code)
            return await response(scope, receive, send)
        if scope[TEXTS]:
            scope[BODY], admitted.counts.texts = content, defaultdict(str)
        if has_alignment or body.get("model") != model:
            content = json.dumps(body).encode()
        await self._answer(admitted, state, scope, _replay(content, receive), send)

    async def _answer(
        self,
        admitted: AdmittedRequest,
        state: AppState,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        token = CURRENT_REQUEST.set(admitted)
        try:
            await self.app(scope, receive, _add_proxy_header(admitted.admission, send))
        finally:
            CURRENT_REQUEST.reset(token)
            state.proxies.unpin(*admitted.admission.pinned)


async def _flush_metrics(state: AppState) -> None:
    """Have the workers write their counters now; otherwise they do so every now and then."""
    with suppress(Exception):  # a dead engine has no new counters: show the last ones
        await asyncio.wait_for(state.workers.collective_rpc("flush_metrics"), _FLUSH_SECONDS)


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None if the client disconnected before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(content: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body in one piece, then whatever the client sends next."""
    pieces: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Message:
        return pieces.pop() if pieces else await receive()

    return replayed


def _add_proxy_header(admission: Admission, send: Send) -> Send:
    if not admission.pinned:
        return send
    value = named_version(admission)

    async def with_header(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            MutableHeaders(scope=message)[PROXY_HEADER] = value
        await send(message)

    return with_header
