"""Who may use the server, and how much: API keys, administrators, limits.

    python -m server --access access.toml

    [default]                    # the limits of keys that have none of their own
    requests_per_minute = 600

    [keys.alice]                 # a name, for logs and errors
    sha256 = "9f86d0..."         # of the key: printf %s "$KEY" | sha256sum
    admin = true                 # may load and unload proxies

    [keys.batch]
    env = "BATCH_KEY"            # the variable that holds the key
    max_samples = 4
    trace = false

Keys without settings of their own come from `--api-key`, ASSENT_API_KEYS and ASSENT_ADMIN_KEYS. Without any key
everybody may do everything, within [default]. `middleware.access` checks every request.
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

API_KEYS, ADMIN_KEYS = "ASSENT_API_KEYS", "ASSENT_ADMIN_KEYS"
CALLER = "assent.caller"
"""Key of an ASGI scope: the Caller; None = the request has no valid key."""

Positive = Annotated[int, Field(ge=1)]


class AccessError(ValueError):
    """The file of --access, or a key, cannot be used; the message says why."""


class Limits(BaseModel):
    """Limits of one request, or of the requests under way or of a minute; None = no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Positive | None = None
    """Of POST requests. This many may also arrive at once."""
    tokens_per_minute: Positive | None = None
    """Of prompts and completions, a judge's too. They count as they are read and written: a request begins while there
    are tokens left, and may end beyond the limit."""
    concurrent_requests: Positive | None = None
    """POST requests under way at once."""
    max_samples: Positive | None = None
    """Samples: `n` or `alignment.best_of`, times the prompts of a batch."""
    max_judgments: Positive | None = None
    """What the judge reads: a comparison by one principle is two, because both orders are read."""
    max_prompt_tokens: Positive | None = None
    """Of each prompt. The prompts of a best-of-N request's judge do not count."""
    trace: bool = True
    """Whether a request may set `alignment.trace`."""


class Key(Limits):
    """A key of the file: where to find it, and its own limits."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    env: str | None = None
    admin: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> "Key":
        if (self.sha256 is None) == (self.env is None):
            raise ValueError("needs either sha256 or env")
        return self

    def digest(self, environment: MutableMapping[str, str]) -> bytes:
        """SHA-256 of the key. A key in the environment is removed from it."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        assert self.env is not None
        key = environment.pop(self.env, "")  # child processes must not inherit it
        if not key:
            raise AccessError(f"the environment variable {self.env} is not set")
        return _digest(key)


class AccessFile(BaseModel):
    """The content of the file of --access."""

    model_config = ConfigDict(extra="forbid")

    default: Limits = Limits()
    keys: dict[str, Key] = {}


@dataclass(eq=False)
class Caller:
    """The holder of a key, or anybody where the server has no keys."""

    name: str
    """For logs and errors."""
    limits: Limits
    admin: bool = False
    identity: str = "anybody"
    """Marks a caller's rows in the database: the key's name in the file, or a hash of the key, because the
    number of a key without a name changes with the list."""
    requests: "Bucket" = field(init=False)
    tokens: "Bucket" = field(init=False)
    active: int = 0
    """POST requests under way."""

    def __post_init__(self) -> None:
        self.requests = Bucket(self.limits.requests_per_minute)
        self.tokens = Bucket(self.limits.tokens_per_minute)


class Bucket:
    """Refills evenly, up to the amount of a minute; more may be taken than there is left."""

    def __init__(self, per_minute: int | None) -> None:
        """None = there is always enough."""
        self.per_minute = per_minute
        self._left, self._at = float(per_minute or 0), monotonic()

    def wait(self) -> float:
        """Seconds until there is at least one; 0 = there is."""
        if self.per_minute is None:
            return 0
        now = monotonic()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (1 - self._left) * 60 / self.per_minute)

    def take(self, amount: int) -> None:
        self._left -= amount


class Access(NamedTuple):
    """All callers, by the SHA-256 digest of their key."""

    callers: Mapping[bytes, Caller]
    anybody: Caller

    def find(self, headers: Headers) -> Caller | None:
        """The caller; None where a key is needed and the request has no valid one."""
        if not self.callers:
            return self.anybody
        # Anthropic's clients send X-Api-Key.
        authorization = headers.get("Authorization", f"Bearer {headers.get('X-Api-Key', '')}")
        scheme, _, given = authorization.partition(" ")
        given_digest = hashlib.sha256(given.encode("latin-1")).digest()
        match: Caller | None = None
        # Compare every key, each in constant time: the response time must not depend on the key.
        for digest, caller in self.callers.items():
            if secrets.compare_digest(given_digest, digest):
                match = caller
        return match if scheme.lower() == "bearer" else None


def read_access(
    file: Path | None, api_keys: Sequence[str], environment: MutableMapping[str, str]
) -> Access:
    """All keys; those in the environment are removed from it.

    Raises AccessError for a file that cannot be read, and for a key that is given twice.
    """
    settings = _parse(file) if file is not None else AccessFile()
    callers: dict[bytes, Caller] = {}

    def add(digest: bytes, caller: Caller) -> None:
        if digest in callers:
            raise AccessError(f"{caller.name} and {callers[digest].name} are the same key")
        callers[digest] = caller

    def add_unnamed(name: str, secret: str, admin: bool) -> None:
        digest = _digest(secret)
        identity = f"key {hashlib.sha256(digest).hexdigest()[:16]}"
        add(digest, Caller(name, settings.default, admin, identity))

    for name, key in settings.keys.items():
        own = key.model_dump(include=set(Limits.model_fields) & key.model_fields_set)
        limits = settings.default.model_copy(update=own)
        add(key.digest(environment), Caller(name, limits, key.admin, name))
    for variable, admin in ((ADMIN_KEYS, True), (API_KEYS, False)):
        for i, secret in enumerate(environment.pop(variable, "").replace(",", " ").split(), 1):
            add_unnamed(f"{variable} {i}", secret, admin)
    for i, secret in enumerate(api_keys, 1):
        add_unnamed(f"--api-key {i}", secret, admin=False)
    return Access(callers, Caller("anybody", settings.default, admin=True))


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
