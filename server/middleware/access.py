"""Lets a request through if its key may send it, and notes the caller in the ASGI scope.

vLLM checks its own API keys on some paths only, such as those under /v1. This middleware covers every path.
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import ADMIN_KEYS, CALLER, Access, Caller
from server.middleware import route_path
from server.middleware.errors import HTTPErrorResponse

USER_PATHS = (
    *("/v1/", "/judge", "/feedback", "/tokenize", "/detokenize", "/invocations", "/ping"),
    *("/inference/v1/generate", "/generative_scoring", "/cohere/", "/v2/"),
    *("/pooling", "/classify", "/score", "/rerank"),
)
"""Prefixes of paths that any key may send to. All others need an administrator's key, except with GET: so does what a
later version of vLLM adds."""
ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Exceptions below `USER_PATHS`."""
OPEN_PATHS = ("/health", "/ready", "/")
PAGE_FILES = "/page/"
"""Prefix of the files of the page at /. They need no key either."""
UNAUTHORIZED = HTTPErrorResponse(
    401,
    "AuthenticationError",
    "This server needs an API key: send 'Authorization: Bearer <key>', or 'X-Api-Key: <key>'.",
    {"WWW-Authenticate": "Bearer"},
)
NO_ADMIN = HTTPErrorResponse(
    403,
    "PermissionDeniedError",
    f"This request needs an administrator's key: one of {ADMIN_KEYS}, or one with admin = true in the file of "
    "--access.",
)
UNKNOWN_HOST = HTTPErrorResponse(
    421,
    "MisdirectedRequestError",
    "This server has no API keys and listens on this machine alone, so that it answers only to an address or to "
    "`localhost` in the Host header: a web page could reach it under a name of its own. Set an API key, or send "
    "`Host: localhost`.",
)


class AccessMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int) -> None:
        self.app, self.access, self.max_body_bytes = app, access, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's own start and stop
            return await self.app(scope, receive, send)
        path = route_path(scope)
        headers = Headers(scope=scope)
        is_open = path in OPEN_PATHS or path.startswith(PAGE_FILES) or _is_preflight(scope, headers)
        caller = self.access.anybody if is_open else self.access.find(headers)
        scope[CALLER] = caller
        error = self._check(scope, headers, path, caller)
        if error is None:
            await self._pass(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error(scope, receive, send)

    def _check(
        self, scope: Scope, headers: Headers, path: str, caller: Caller | None
    ) -> HTTPErrorResponse | None:
        """Why the request is refused; None = it is not."""
        method = scope.get("method")  # None of a websocket
        if caller is None:
            return UNAUTHORIZED
        if not self.access.callers and _may_be_rebound(scope, headers):
            return UNKNOWN_HOST
        if not caller.admin and needs_admin(method, path):
            return NO_ADMIN
        if method in ("POST", None) and (refusal := _over_limit(caller)):
            return refusal
        if int(headers.get("content-length", 0)) > self.max_body_bytes:
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

        caller, is_post = scope[CALLER], scope.get("method") == "POST"
        caller.active += is_post
        try:
            await self.app(scope, count_bytes, note_start)
        except _TooLarge:
            if not has_started:
                await self._too_large()(scope, receive, send)
        finally:
            caller.active -= is_post

    def _too_large(self) -> HTTPErrorResponse:
        return HTTPErrorResponse(
            413,
            "RequestTooLargeError",
            f"The body is larger than this server accepts: {self.max_body_bytes} bytes, set by --max-body-bytes.",
        )


def _over_limit(caller: Caller) -> HTTPErrorResponse | None:
    """Count one more request; the error where the caller may not send it now."""
    limits = caller.limits
    if limits.concurrent_requests is not None and caller.active >= limits.concurrent_requests:
        message = f"concurrent_requests: this key may have {limits.concurrent_requests} requests under way"
        return _too_many(message, 1)
    if wait := caller.tokens.wait():
        return _too_many(
            f"tokens_per_minute: this key may use {limits.tokens_per_minute} tokens a minute", wait
        )
    if wait := caller.requests.wait():
        return _too_many(
            f"requests_per_minute: this key may send {limits.requests_per_minute} requests a minute",
            wait,
        )
    caller.requests.take(1)
    return None


def _too_many(message: str, wait: float) -> HTTPErrorResponse:
    return HTTPErrorResponse(429, "RateLimitError", message, {"Retry-After": str(int(wait) + 1)})


def needs_admin(method: str | None, path: str) -> bool:
    if method in ("GET", "HEAD", "OPTIONS", None):
        return False
    return path.startswith(ADMIN_PATHS) or not path.startswith(USER_PATHS)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks what it may send, which it does without a key. The CORS middleware answers."""
    return (
        scope.get("method") == "OPTIONS"
        and "origin" in headers
        and "access-control-request-method" in headers
    )


def _may_be_rebound(scope: Scope, headers: Headers) -> bool:
    """Whether the request came to a loopback address under a name that anybody's DNS server may point there.

    A web page can then send requests to this server as if it were the page's own (DNS rebinding).
    """
    server = scope.get("server")
    if server is None or not _is_loopback(server[0]):
        return False
    host = urlsplit(f"//{headers.get('host', '')}").hostname
    if not host:  # a load balancer's health check; every browser sends one
        return False
    return not (host == "localhost" or host.endswith(".localhost") or _is_address(host))


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ip_address(host).is_loopback


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class _TooLarge(Exception):
    """The body is larger than Content-Length said, or than allowed."""
