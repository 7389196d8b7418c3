"""One line of JSON on standard output for every request, when it has ended.

    {"time": "2026-11-22T10:00:00.123+00:00", "caller": "alice", "method": "POST",
     "path": "/v1/chat/completions", "request_id": "the X-Request-Id", "status": 200,
     "seconds": 0.412, "first_byte_seconds": 0.051, "complete": true,
     "model": "llm", "proxy": "aligned@1f0c...", "ids": ["chatcmpl-..."], "best_of": 1,
     "tokens": {"prompt": 31, "completion": 64},
     "proxy_counts": {"proposed": 90, "accepted": 64, "rejected": 26, "forced": 0}}

`status` is null where the client went before an answer began, and `complete` is false where it went
before its end. `tokens` has `judge_prompt` and `judge_completion` where a judge was asked. What was
said is in no line, unless --log-texts adds `request` and `completions`. GET /health and /metrics,
which come every few seconds, leave none.
"""

import asyncio
import json
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.access import CALLER
from server.admission import Plan
from server.receipts import sum_counts
from server.state import Served

PLAN, TEXTS, BODY = "assent.plan", "assent.texts", "assent.body"
"""Of an ASGI scope: what was admitted, whether texts are wanted, and then the body as it came."""

_QUIET = ("/health", "/metrics")
_COUNTS_SECONDS = 5.0  # for the worker to say what the proxy did

logger = logging.getLogger("assent.requests")


def write_to_stdout() -> None:
    """Each line as it is, whatever the process's other logs look like."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class RequestLog:
    """ASGI middleware, outside all others: counts every request, and writes its line."""

    def __init__(self, app: ASGIApp, texts: bool = False) -> None:
        self.app, self.texts = app, texts
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or (scope["method"] == "GET" and path.rstrip("/") in _QUIET):
            return await self.app(scope, receive, send)
        scope[TEXTS] = self.texts
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "path": path,
            "request_id": Headers(scope=scope).get("x-request-id"),
            "status": None,
            "complete": False,
        }
        start, gone = monotonic(), False

        async def listened() -> Message:
            nonlocal gone
            message = await receive()
            gone |= message["type"] == "http.disconnect" and not line["complete"]
            return message

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and not gone:
                line["status"] = message["status"]
            elif "first_byte_seconds" not in line and not gone:
                line["first_byte_seconds"] = round(monotonic() - start, 4)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                line["complete"] = not gone

        try:
            await self.app(scope, listened, watched)
        except Exception:
            line["status"] = line["status"] or 500
            raise
        finally:
            line["seconds"] = round(monotonic() - start, 4)
            if gone:
                metrics.CANCELLED.labels(getattr(scope.get("route"), "path", "unknown")).inc()
            if logger.isEnabledFor(logging.INFO):
                # The worker's counts are asked for when the client has its answer already.
                task = asyncio.create_task(self._write(line, scope))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _write(self, line: dict[str, Any], scope: Scope) -> None:
        if (caller := scope.get(CALLER)) is not None:
            line["caller"] = caller.name
        plan: Plan | None = scope.get(PLAN)
        if plan is not None:
            line |= await _of_plan(plan, scope["app"].state.assent)
        if BODY in scope:
            line["request"] = json.loads(scope[BODY])
        logger.info(json.dumps(line))


async def _of_plan(plan: Plan, state: Served) -> dict[str, Any]:
    found: dict[str, Any] = {"model": plan.asked_model}
    if plan.pinned is not None:
        found["proxy"] = f"{plan.pinned.shown_name}@{plan.pinned.version}"
        with suppress(Exception):  # the engine may be dead; the line is wanted then above all
            found["proxy_counts"] = await asyncio.wait_for(_counts(plan, state), _COUNTS_SECONDS)
    if plan.best_of > 1:
        found["best_of"] = plan.best_of
    if plan.tokens:
        found |= {"ids": plan.engine_ids, "tokens": dict(plan.tokens)}
    if plan.texts is not None:
        found["completions"] = list(plan.texts.values())
    return found


async def _counts(plan: Plan, state: Served) -> dict[str, int]:
    taken = (
        plan.all_counts() if plan.take_counts is not None else state.counts.take(plan.engine_ids)
    )
    return sum_counts(await taken)
