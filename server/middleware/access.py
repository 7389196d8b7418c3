"""Lets a request through if its key may send it, and notes the caller in the ASGI scope.

vLLM checks its own API keys on some paths only, such as those under /v1. This middleware covers every path.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import ADMIN_KEYS, CALLER, Access, Caller
from server.middleware.errors import HTTPErrorResponse

ADMIN_PATHS = ("/proxies", "/positions")
"""Prefixes of paths that need an administrator's key, except with GET."""
OPEN_PATHS = ("/health",)
UNAUTHORIZED = HTTPErrorResponse(
    401,
    "AuthenticationError",
    "This server needs an API key: send 'Authorization: Bearer <key>'.",
    {"WWW-Authenticate": "Bearer"},
)
NO_ADMIN = HTTPErrorResponse(
    403,
    "PermissionDeniedError",
    f"This request needs an administrator's key: one of {ADMIN_KEYS}, or one with admin = true in the file of "
    "--access.",
)


class AccessMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int) -> None:
        self.app, self.access, self.max_body_bytes = app, access, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's own start and stop
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # A browser's preflight request (OPTIONS) carries no key.
        is_open = path in OPEN_PATHS or scope.get("method") == "OPTIONS"
        caller = self.access.anybody if is_open else self.access.find(Headers(scope=scope))
        scope[CALLER] = caller
        error = self._check(scope, path, caller)
        if error is None:
            await self._pass(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error(scope, receive, send)

    def _check(self, scope: Scope, path: str, caller: Caller | None) -> HTTPErrorResponse | None:
        """Why the request is refused; None = it is not."""
        method = scope.get("method")  # None of a websocket
        if caller is None:
            return UNAUTHORIZED
        if path.startswith(ADMIN_PATHS) and method != "GET" and not caller.admin:
            return NO_ADMIN
        if method in ("POST", None) and (wait := caller.take()):
            limit = caller.limits.requests_per_minute
            return HTTPErrorResponse(
                429,
                "RateLimitError",
                f"requests_per_minute: this key may send {limit} requests a minute",
                {"Retry-After": str(int(wait) + 1)},
            )
        if int(Headers(scope=scope).get("content-length", 0)) > self.max_body_bytes:
            return self._too_large()
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, which may read at most `max_body_bytes`, whatever Content-Length says."""
        left, has_started = self.max_body_bytes, False

        async def count_bytes() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if left < 0:
                raise _TooLarge
            return message

        async def note_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, count_bytes, note_start)
        except _TooLarge:
            if not has_started:
                await self._too_large()(scope, receive, send)

    def _too_large(self) -> HTTPErrorResponse:
        return HTTPErrorResponse(
            413,
            "RequestTooLargeError",
            f"The body is larger than this server accepts: {self.max_body_bytes} bytes, set by --max-body-bytes.",
        )


class _TooLarge(Exception):
    """The body is larger than Content-Length said, or than allowed."""
