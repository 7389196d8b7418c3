"""Who may use the server, and how much: API keys, administrators, limits.

    python -m server --access access.toml

    [default]                    # the limits of whoever has none of their own
    requests_per_minute = 600

    [keys.alice]                 # a name, for logs and errors
    sha256 = "9f86d0..."         # of the key: printf %s "$KEY" | sha256sum
    admin = true                 # may load and unload proxies

    [keys.batch]
    env = "BATCH_KEY"            # the variable that holds the key
    max_samples = 4
    trace = false

Keys that are all alike come from `--api-key`, ASSENT_API_KEYS and ASSENT_ADMIN_KEYS. Without any key
everybody may do everything, within [default]. vLLM's own guard leaves out every path that is not
under /v1 or its like, so this one takes its place.
"""

import hashlib
import secrets
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMINISTRATORS = ("/proxies", "/positions")
"""Paths that want an administrator's key, but for GET."""
API_KEYS, ADMIN_KEYS = "ASSENT_API_KEYS", "ASSENT_ADMIN_KEYS"
OPEN_PATHS = ("/health",)
CALLER = "assent.caller"
"""Of an ASGI scope: who sent the request; None = whoever it is lacks a key."""

Positive = Annotated[int, Field(ge=1)]


class AccessError(ValueError):
    """The file of --access, or a key, cannot be used; the message is for a person."""


class Limits(BaseModel):
    """What one request, or a minute of them, may ask for; None = as much as the server can."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Positive | None = None
    """Of those that ask for work (POST); as many may come at once."""
    max_samples: Positive | None = None
    """Answers to be drawn: `n` or `alignment.best_of`, times the prompts of a batch."""
    max_prompt_tokens: Positive | None = None
    """Of each prompt that the model reads; what the judge of a best-of-N reads is not counted."""
    trace: bool = True
    """Whether `alignment.trace` may be asked for."""


class Key(Limits):
    """One of the file's keys: where it is found, and what is its own."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    env: str | None = None
    admin: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> "Key":
        if (self.sha256 is None) == (self.env is None):
            raise ValueError("needs either sha256 or env")
        return self

    def digest(self, environment: MutableMapping[str, str]) -> bytes:
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        assert self.env is not None
        key = environment.pop(self.env, "")  # no child process, and no dump, needs to know it
        if not key:
            raise AccessError(f"the environment variable {self.env} is not set")
        return _digest(key)


class AccessFile(BaseModel):
    """What the file of --access says."""

    model_config = ConfigDict(extra="forbid")

    default: Limits = Limits()
    keys: dict[str, Key] = {}


@dataclass(eq=False)
class Caller:
    """Whoever holds a key, or anybody where there is none."""

    name: str
    """For logs and errors."""
    limits: Limits
    admin: bool = False
    identity: str = "anybody"
    """By which what is kept of a caller is known: the name that the file gives, or a hash of the key, since the
    numbers of keys without a name change with the list of them."""
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.limits.requests_per_minute or 0, monotonic()

    def take(self) -> float:
        """Takes one request out of the minute's; returns the seconds to wait where none is left."""
        most = self.limits.requests_per_minute
        if most is None:
            return 0
        now = monotonic()
        self._left = min(most, self._left + (now - self._at) * most / 60)
        self._at = now
        if self._left < 1:
            return (1 - self._left) * 60 / most
        self._left -= 1
        return 0


class Access(NamedTuple):
    """All callers, by the SHA-256 of their key."""

    callers: Mapping[bytes, Caller]
    anybody: Caller

    def find(self, headers: Headers) -> Caller | None:
        """Who sent the request; None where it lacks a key that is needed."""
        if not self.callers:
            return self.anybody
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        given_digest, found = hashlib.sha256(given.encode("latin-1")).digest(), None
        # Every key is compared, each in constant time: how long it takes tells nothing.
        for digest, caller in self.callers.items():
            if secrets.compare_digest(given_digest, digest):
                found = caller
        return found if scheme.lower() == "bearer" else None


def read_access(
    file: Path | None, api_keys: Sequence[str], environment: MutableMapping[str, str]
) -> Access:
    """All keys there are; those in the environment are taken out of it.

    Raises AccessError for a file that cannot be read, and for a key that is there twice.
    """
    stated = _parse(file) if file is not None else AccessFile()
    callers: dict[bytes, Caller] = {}

    def add(digest: bytes, caller: Caller) -> None:
        if digest in callers:
            raise AccessError(f"{caller.name} and {callers[digest].name} are the same key")
        callers[digest] = caller

    def add_unnamed(name: str, secret: str, admin: bool) -> None:
        digest = _digest(secret)
        identity = f"key {hashlib.sha256(digest).hexdigest()[:16]}"
        add(digest, Caller(name, stated.default, admin, identity))

    for name, key in stated.keys.items():
        own = key.model_dump(include=set(Limits.model_fields) & key.model_fields_set)
        limits = stated.default.model_copy(update=own)
        add(key.digest(environment), Caller(name, limits, key.admin, name))
    for variable, admin in ((ADMIN_KEYS, True), (API_KEYS, False)):
        for i, secret in enumerate(environment.pop(variable, "").replace(",", " ").split(), 1):
            add_unnamed(f"{variable} {i}", secret, admin)
    for i, secret in enumerate(api_keys, 1):
        add_unnamed(f"--api-key {i}", secret, admin=False)
    return Access(callers, Caller("anybody", stated.default, admin=True))


def _parse(file: Path) -> AccessFile:
    try:
        return AccessFile.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise AccessError(f"{file}: {where}: {first['msg']}") from None
        raise AccessError(f"{file}: {error}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class AccessGuard:
    """ASGI middleware: lets a request through if its caller may send it, and says who that is."""

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int) -> None:
        self.app, self.access, self.max_body_bytes = app, access, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's own start and stop
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers, method = Headers(scope=scope), scope.get("method")
        # A browser asks with OPTIONS before it sends the key.
        is_open = path in OPEN_PATHS or method == "OPTIONS"
        caller = self.access.anybody if is_open else self.access.find(headers)
        scope[CALLER], refusal = caller, None
        if caller is None:
            refusal = UNAUTHORIZED
        elif path.startswith(ADMINISTRATORS) and method != "GET" and not caller.admin:
            refusal = NO_ADMIN
        elif method in ("POST", None) and (wait := caller.take()):
            most = caller.limits.requests_per_minute
            refusal = Refusal(
                429,
                "RateLimitError",
                f"requests_per_minute: this key may send {most} requests a minute",
                {"Retry-After": str(int(wait) + 1)},
            )
        elif int(headers.get("content-length", 0)) > self.max_body_bytes:
            refusal = self._too_large()
        if refusal is None:
            await self._pass(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal.response()(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """On to the app, which may read so many bytes and no more, whatever was announced."""
        left, begun = self.max_body_bytes, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if left < 0:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLarge:
            if not begun:
                await self._too_large().response()(scope, receive, send)

    def _too_large(self) -> "Refusal":
        return Refusal(
            413,
            "RequestTooLargeError",
            f"The body is larger than this server takes: {self.max_body_bytes} bytes, its --max-body-bytes.",
        )


class _TooLarge(Exception):
    """The body is larger than was announced, or allowed."""


class Refusal(NamedTuple):
    """An error in OpenAI's shape."""

    status: int
    kind: str
    message: str
    headers: dict[str, str] | None = None

    def response(self) -> JSONResponse:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": None,
            "code": self.status,
        }
        return JSONResponse({"error": error}, self.status, self.headers)


UNAUTHORIZED = Refusal(
    401,
    "AuthenticationError",
    "This server needs an API key: send 'Authorization: Bearer <key>'.",
    {"WWW-Authenticate": "Bearer"},
)
NO_ADMIN = Refusal(
    403,
    "PermissionDeniedError",
    f"This wants an administrator's key, as all do that load and unload proxies: one of {ADMIN_KEYS}, or one with "
    "admin = true in the file of --access.",
)
