"""SIGTERM while serving: requests under way are finished, new ones are refused, then the server stops.

vLLM shuts its engine down at once on SIGTERM and SIGINT. Here SIGTERM waits for the last response first,
at most --drain-seconds, and then raises SIGINT for vLLM. SIGINT itself (Ctrl-C) does not wait.
"""

import asyncio
import logging
import signal

from starlette.types import ASGIApp, Receive, Scope, Send

from server.middleware.errors import HTTPErrorResponse

logger = logging.getLogger(__name__)

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
        self.in_flight = 0
        self.stopping: asyncio.Task[None] | None = None
        self.idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # vLLM has set its own handler by now
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin)
            return await self.app(scope, receive, send)
        if self.stopping is not None and scope.get("path", "").rstrip("/") != "/metrics":
            return await STOPPING(scope, receive, send)
        self.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self.idle.set()

    def begin(self) -> None:
        """Refuse new requests, and stop when the last one has ended."""
        if self.stopping is None:
            logger.info("Stopping: %s requests are under way.", self.in_flight)
            self.stopping = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        self.idle.clear()
        if self.in_flight:
            try:
                await asyncio.wait_for(self.idle.wait(), self.seconds)
            except TimeoutError:
                logger.warning(
                    "%s requests were not finished after %g s and are aborted.",
                    self.in_flight,
                    self.seconds,
                )
        signal.raise_signal(signal.SIGINT)
