"""SIGTERM while serving: requests under way are finished, new ones are refused, then the server stops.

vLLM shuts its engine down at once on SIGTERM and SIGINT. Here SIGTERM waits for the last response first,
at most --drain-seconds. What is left then is answered with an error, a stream with an error event. Then SIGINT is
raised for vLLM. SIGINT itself (Ctrl-C) does not wait. `server.ending` ends the process whatever hangs.
"""

import asyncio
import logging
import signal
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.middleware.errors import HTTPErrorResponse

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""For the errors that requests get which are aborted."""
RETRY_SECONDS = 5
"""When a client should try again, at another server or this one's successor."""
STOPPING = HTTPErrorResponse(
    503,
    "ServiceUnavailableError",
    "This server is stopping: send the request again in some seconds.",
    {"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
)


class DrainMiddleware:
    """ASGI middleware; must come before anything that takes long."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds
        self.tasks: set[asyncio.Task[Any]] = set()
        """Of the requests under way."""
        self.aborting = False
        self.stopping: asyncio.Task[None] | None = None
        self.idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # vLLM has set its own handler by now
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin)
            return await self.app(scope, receive, send)
        if self.stopping is not None and scope.get("path", "").rstrip("/") != "/metrics":
            return await STOPPING(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        response = _Response(send)
        try:
            await self.app(scope, receive, response.send)
        except asyncio.CancelledError:
            if not self.aborting or scope["type"] != "http":
                raise
            await response.abort(scope, receive)
        finally:
            self.tasks.discard(task)
            if not self.tasks:
                self.idle.set()

    def begin(self) -> None:
        """Refuse new requests, and stop when the last one has ended."""
        if self.stopping is None:
            logger.info("Stopping: %s requests are under way.", len(self.tasks))
            self.stopping = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        if not await self._is_idle(self.seconds):
            logger.warning(
                "%s requests were not finished after %g s and are aborted.",
                len(self.tasks),
                self.seconds,
            )
            self.aborting = True
            for task in self.tasks:
                task.cancel()
            await self._is_idle(ANSWER_SECONDS)
        signal.raise_signal(signal.SIGINT)

    async def _is_idle(self, seconds: float) -> bool:
        """Whether no request is under way, now or within so many seconds."""
        self.idle.clear()
        if self.tasks:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.idle.wait(), seconds)
        return not self.tasks


class _Response:
    """What was sent of a response, so that it can be ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: Headers | None = None  # None = nothing was sent

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._headers = Headers(raw=message["headers"])
        await self._send(message)

    async def abort(self, scope: Scope, receive: Receive) -> None:
        """Answer with an error, or end a stream of events with one. Another body is cut short, which clients notice."""
        if self._headers is None:
            await STOPPING(scope, receive, self._send)
        elif self._headers.get("content-type", "").startswith("text/event-stream"):
            body = STOPPING.as_event(scope)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            raise asyncio.CancelledError
