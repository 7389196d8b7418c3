"""One line of JSON on standard output for every request, when it has ended.

    {"time": "2026-11-22T10:00:00.123+00:00", "caller": "alice", "method": "POST",
     "path": "/v1/chat/completions", "request_id": "the X-Request-Id", "status": 200,
     "seconds": 0.412, "first_byte_seconds": 0.051, "complete": true,
     "model": "llm", "proxy": "aligned@1f0c...", "ids": ["chatcmpl-..."], "best_of": 1,
     "tokens": {"prompt": 31, "completion": 64},
     "proxy_counts": {"proposed": 90, "accepted": 64, "rejected": 26, "forced": 0}}

Of several proxies `proxy` is "a+b@<version of a>+<version of b>". `status` is null where the client
disconnected before the response began, and `complete` is false where it disconnected before its end.
`tokens` has `judge_prompt` and `judge_completion` where a judge compared responses. No line has texts,
unless --log-texts adds `request` and `completions`.
GET /health, /ready and /metrics, which come every few seconds, are not logged.
"""

import asyncio
import json
import logging
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic, time_ns
from typing import Any

from opentelemetry.trace import Span
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.access import CALLER
from server.admission import AdmittedRequest
from server.answers import named_version
from server.middleware import route_path
from server.tracing import begin_span, end_span

ADMITTED, TEXTS, BODY = "assent.admitted", "assent.texts", "assent.body"
"""Keys of an ASGI scope: the admitted request, whether texts are logged, and the original body if they are."""

REQUEST_ID = "X-Request-Id"
"""A request's header, which the response repeats."""
_PLAIN_ID = re.compile(r"[!-~]{1,128}")
_QUIET = ("/health", "/ready", "/metrics")
_COUNTS_SECONDS = 5.0  # limit for the worker to report its counts

logger = logging.getLogger("assent.requests")


def write_to_stdout() -> None:
    """Write each line as it is, whatever the format of the process's other logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class RequestLogMiddleware:
    """ASGI middleware, outside all others: logs every request, repeats its id, and counts disconnected clients."""

    def __init__(self, app: ASGIApp, texts: bool = False, tracing: bool = False) -> None:
        self.app, self.texts, self.tracing = app, texts, tracing
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if "path" in scope else ""
        if scope["type"] != "http" or (scope["method"] == "GET" and path.rstrip("/") in _QUIET):
            return await self.app(scope, receive, send)
        scope[TEXTS] = self.texts
        request_id = Headers(scope=scope).get(REQUEST_ID)
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "path": path,
            "request_id": request_id,
            "status": None,
            "complete": False,
        }
        span = begin_span(scope) if self.tracing else None
        start, is_disconnected = monotonic(), False

        async def note_disconnect() -> Message:
            nonlocal is_disconnected
            message = await receive()
            is_disconnected |= message["type"] == "http.disconnect" and not line["complete"]
            return message

        async def note_progress(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_disconnected:
                line["status"] = message["status"]
                if request_id is not None and _PLAIN_ID.fullmatch(request_id):
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif "first_byte_seconds" not in line and not is_disconnected:
                line["first_byte_seconds"] = round(monotonic() - start, 4)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                line["complete"] = not is_disconnected

        try:
            await self.app(scope, note_disconnect, note_progress)
        except Exception:
            line["status"] = line["status"] or 500
            raise
        finally:
            line["seconds"] = round(monotonic() - start, 4)
            if is_disconnected:
                metrics.CANCELLED.labels(getattr(scope.get("route"), "path", "unknown")).inc()
            if logger.isEnabledFor(logging.INFO) or is_disconnected or span is not None:
                # The client has its response already when the worker's counts are read. Reading makes the worker
                # forget them, and the trace of a client that disconnected.
                task = asyncio.create_task(_write(line, scope, span, time_ns()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)


async def _write(line: dict[str, Any], scope: Scope, span: Span | None, end: int) -> None:
    """Complete the line and write it; end the span, if there is one, at `end`."""
    if (caller := scope.get(CALLER)) is not None:
        line["caller"] = caller.name
    admitted: AdmittedRequest | None = scope.get(ADMITTED)
    if admitted is not None:
        line |= await _fields(admitted)
    if BODY in scope:
        line["request"] = json.loads(scope[BODY])
    logger.info(json.dumps(line))
    if span is not None:
        end_span(span, line, end)


async def _fields(admitted: AdmittedRequest) -> dict[str, Any]:
    """The fields of a line about the model's work."""
    admission, counts = admitted
    fields: dict[str, Any] = {"model": admission.requested_model}
    if admission.pinned:
        fields["proxy"] = named_version(admission)
        with suppress(Exception):  # the line is needed most when the engine is dead
            fields["proxy_counts"] = await asyncio.wait_for(counts.total(), _COUNTS_SECONDS)
    if admission.best_of > 1:
        fields |= {"best_of": admission.best_of, "judge": admission.judge.kind}
    if counts.tokens:
        fields |= {"ids": counts.engine_ids, "tokens": dict(counts.tokens)}
    if counts.texts is not None:
        fields["completions"] = list(counts.texts.values())
    return fields
