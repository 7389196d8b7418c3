"""One API key for every route but /health.

vLLM's own guard leaves out every path that is not under /v1 or its like, and answers in a shape of
its own, so this one takes its place.
"""

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health",)

UNAUTHORIZED = {
    "error": {
        "message": "This server needs an API key: send 'Authorization: Bearer <key>'.",
        "type": "AuthenticationError",
        "param": None,
        "code": 401,
    }
}


class ApiKeyGuard:
    """ASGI middleware: lets a request through if it carries one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            response = JSONResponse(
                UNAUTHORIZED, status_code=401, headers={"WWW-Authenticate": "Bearer"}
            )
            await response(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] not in ("http", "websocket"):  # the server's own start and stop
            return True
        if scope.get("method") == "OPTIONS":  # a browser asks before it sends the key
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in OPEN_PATHS or self._has_key(Headers(scope=scope))

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [secrets.compare_digest(given.encode("latin-1"), key) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)
