"""Errors of `/v1/messages` in Anthropic's shape, whoever made them: this middleware's neighbours, our routes or vLLM.

{"type": "error", "error": {"type": "invalid_request_error", "message": "..."}}
"""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission import MESSAGES
from server.middleware import route_path

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's types of errors, by HTTP status; the others are `invalid_request_error` and `api_error`."""


def takes_anthropic_errors(scope: Scope) -> bool:
    """Whether the request is one to Anthropic's API."""
    path = route_path(scope) if scope["type"] == "http" else ""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """The error as JSON."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class AnthropicErrorMiddleware:
    """ASGI middleware, outside all that answer with errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not takes_anthropic_errors(scope):
            return await self.app(scope, receive, send)
        translator = _Translator(send)
        try:
            await self.app(scope, receive, translator.send)
        except Exception:  # Starlette answers outside of all middleware, unless there is an answer
            if not translator.has_started:
                await translator.fail()
            raise


class _Translator:
    """Passes a response on, or holds an error back until its body is complete."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None  # of an error that was not sent yet
        self._body = b""
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            self.has_started = True
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._start, _message(self._body))

    async def fail(self) -> None:
        """Answer with the error of an exception that nobody expected."""
        headers = [(b"content-type", b"application/json")]
        start = {"type": "http.response.start", "status": 500, "headers": headers}
        await self._send_error(start, "Internal Server Error")

    async def _send_error(self, start: Message, message: str) -> None:
        body = json.dumps(anthropic_error(start["status"], message)).encode()
        headers = MutableHeaders(raw=list(Headers(raw=start["headers"]).raw))
        headers["content-type"], headers["content-length"] = "application/json", str(len(body))
        self.has_started = True
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _message(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or in any other."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return body.decode(errors="replace")
