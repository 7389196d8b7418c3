"""The loaded proxies: which version a name stands for, and which requests use it.

A proxy is identified by (name, version); the version is the hash of its content. Its life:

    load ──► serving ──► draining ──► unloaded          shadow ──► unloaded
                ▲ load again │ when the last request that was pinned to it has ended
                └────────────┘

A name stands for one version at a time. A request is pinned to a version when it is admitted, and
that version is not unloaded from the worker before the response has ended, whatever is loaded or
unloaded meanwhile. So a name never changes its meaning under a running request.

This class decides which versions serve. The worker loads and unloads what it is told, and keeps what its running
requests use; `proxy_manifest` and `learned_proxies` only ask for changes.
"""

import asyncio
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from proxy.checkpoint import CONFIG_FILE, WEIGHTS_FILE, BaseModelId, ProxyError, load
from server.engine import EngineDeadError, Workers

logger = logging.getLogger(__name__)

PROXY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "at most 128 letters, digits and . _ -, the first a letter or digit"
"""A learned proxy's name is also a directory's: no dot comes first."""
OWNER = "/"
"""Separates the name of a key's own proxy from a hash of the key. No valid name has it, so no request can use one."""

State = Literal["serving", "shadow", "draining", "unloaded"]


class ProxyStateError(Exception):
    """A proxy cannot be loaded or unloaded; `status` is the HTTP status, the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Checkpoint:
    """A proxy of the command line."""

    name: str
    directory: Path
    shadow: bool = False


@dataclass(eq=False)
class ServedVersion:
    """One loaded version of a proxy."""

    name: str
    version: str
    description: dict[str, Any]
    """The worker's description: sizes, directory, base, training."""
    state: State
    in_flight: int = 0
    """Number of requests pinned to it."""

    @property
    def shown_name(self) -> str:
        """The name that its callers use."""
        return self.name.partition(OWNER)[0]

    @property
    def is_owned(self) -> bool:
        """Whether it belongs to a single key."""
        return OWNER in self.name

    def as_json(self, *, with_directory: bool) -> dict[str, Any]:
        """For a response. Where its checkpoint lies is for administrators."""
        hidden = {"name", "version", "shadow"} | (set() if with_directory else {"directory"})
        return {
            "object": "proxy",
            "name": self.name,
            "version": self.version,
            "state": self.state,
            "in_flight": self.in_flight,
        } | {key: value for key, value in self.description.items() if key not in hidden}


class Proxies:
    """All loaded proxies. Calls run on the event loop; loads and unloads are serialized."""

    def __init__(
        self, workers: Workers, *, base: BaseModelId | None = None, root: Path | None = None
    ) -> None:
        """
        Args:
            workers: makes calls on every rank.
            base: the LLM that proxies must be trained for; None: only the worker checks it.
            root: the directory below which proxies may be loaded over HTTP; None = none may.
        """
        self.root = root
        self._workers = workers
        self._base = base
        self._loaded: dict[tuple[str, str], ServedVersion] = {}  # draining ones included
        self._bound: dict[str, ServedVersion] = {}  # what each name stands for, shadows included
        self._lock = asyncio.Lock()
        self._sweeps: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[ServedVersion]:
        return iter(self._loaded.values())

    def names(self) -> list[str]:
        """The names that a request may use."""
        return [
            name
            for name, proxy in self._bound.items()
            if proxy.state == "serving" and not proxy.is_owned
        ]

    def bound(self, name: str) -> ServedVersion | None:
        """The version that a name stands for now, shadows included."""
        return self._bound.get(name)

    def pin(self, *proxies: ServedVersion) -> None:
        """Keep these versions loaded until `unpin`. They must be those that their names stand for."""
        for proxy in proxies:
            proxy.in_flight += 1

    def unpin(self, *proxies: ServedVersion) -> None:
        """End a pin; the last one of a draining version unloads it."""
        for proxy in proxies:
            proxy.in_flight -= 1
        if any(proxy.state == "draining" and proxy.in_flight == 0 for proxy in proxies):
            sweep = asyncio.create_task(self._sweep())
            self._sweeps.add(sweep)  # the event loop itself holds tasks only weakly
            sweep.add_done_callback(self._sweeps.discard)

    async def load(
        self, name: str, directory: Path, *, shadow: bool = False, version: str | None = None
    ) -> tuple[ServedVersion, bool]:
        """Bind the name to the checkpoint in a directory: all ranks load it, or none.

        Args:
            version: the expected version; None = any.

        Returns:
            The version, and whether it was loaded now; a loaded version is not loaded again.

        Raises:
            ProxyStateError: nothing has changed; the message says why.
        """
        async with self._lock:
            # Read it here first, in a thread: most mistakes show before a worker is called.
            try:
                checkpoint = await asyncio.to_thread(load, directory, base=self._base)
            except ProxyError as error:
                raise ProxyStateError(400, str(error)) from None
            if version not in (None, checkpoint.version):
                raise ProxyStateError(
                    409,
                    f"{directory} holds version {checkpoint.version} by now, and not {version}: load it again",
                )
            current = self._bound.get(name)
            if current is not None and (current.state == "shadow") != shadow:
                raise ProxyStateError(
                    409,
                    f"{name!r} is loaded as a {'shadow' if not shadow else 'serving proxy'}: "
                    f"unload it first, or take another name",
                )
            proxy = self._loaded.get((name, checkpoint.version))
            is_new = proxy is None
            if proxy is None:
                description = await self._load_on_all(name, directory, checkpoint.version, shadow)
                proxy = ServedVersion(name, checkpoint.version, description, "draining")
                self._loaded[name, checkpoint.version] = proxy
            if proxy is not current:
                self._retire(current)
                self._bound[name] = proxy
                proxy.state = "shadow" if shadow else "serving"
                await self._unload_idle()
            return proxy, is_new

    async def unload(self, name: str, version: str | None = None) -> ServedVersion:
        """Give a proxy to no new request, and unload it when no request uses it.

        Args:
            version: None = the one that the name stands for.

        Raises:
            ProxyStateError: it is not loaded.
        """
        async with self._lock:
            if version is None:
                proxy = self._bound.get(name)
            else:
                proxy = self._loaded.get((name, version))
            if proxy is None:
                loaded = ", ".join(f"{p.name} {p.version}" for p in self) or "none"
                which = f" of version {version!r}" if version is not None else ""
                raise ProxyStateError(
                    404, f"No proxy {name!r}{which} is loaded. Loaded are: {loaded}."
                )
            if self._bound.get(name) is proxy:
                del self._bound[name]
            self._retire(proxy)
            await self._unload_idle()
            return proxy

    async def _sweep(self) -> None:
        async with self._lock:
            await self._unload_idle()

    def _retire(self, proxy: ServedVersion | None) -> None:
        if proxy is not None:
            proxy.state = "draining"

    async def _unload_idle(self) -> None:
        """Unload what is draining and unused. Only under the lock, so that none of it is bound again."""
        idle = [p for p in self if p.state == "draining" and p.in_flight == 0]
        for proxy in idle:
            try:
                await self._workers.collective_rpc("unload_proxy", args=(proxy.name, proxy.version))
            except Exception:  # it stays draining, and the next call tries again
                logger.exception("Proxy %s %s was not unloaded.", proxy.name, proxy.version)
            else:
                del self._loaded[proxy.name, proxy.version]
                proxy.state = "unloaded"

    async def _load_on_all(
        self, name: str, directory: Path, version: str, shadow: bool
    ) -> dict[str, Any]:
        try:
            answers = await self._workers.collective_rpc(
                "load_proxy", args=(name, str(directory), shadow)
            )
        except EngineDeadError:
            raise
        except (
            Exception
        ) as error:  # one engine's ranks load all or none; other engines may have loaded it
            await self._unload_quietly(name, {version})
            raise ProxyStateError(400, _worker_message(error)) from error
        loaded = {str(answer.get("version")) for answer in answers}
        if loaded != {version}:
            await self._unload_quietly(name, loaded | {version})
            raise ProxyStateError(
                409,
                f"the checkpoint in {directory} changed while it was loaded: version {version} "
                f"was checked, but the ranks loaded {', '.join(sorted(loaded))}. Load it again.",
            )
        return dict(answers[0])

    async def _unload_quietly(self, name: str, versions: set[str]) -> None:
        for version in versions:
            try:
                await self._workers.collective_rpc("unload_proxy", args=(name, version))
            except Exception as error:  # it was not loaded there
                logger.info("Nothing to undo: %s", error)


def check_name(name: str, models: Collection[str]) -> None:
    """Raises ProxyStateError if `<model>:<name>` is itself the name of a model or adapter that is served."""
    for model in models:
        if f"{model}:{name}" in models:
            message = f"'{model}:{name}' is the name of a served model: take another"
            raise ProxyStateError(409, message)


def find_below(root: Path, path: str) -> Path:
    """The directory of a client's path below a root, with all links resolved.

    Raises:
        ProxyStateError: the path leads out of the root, or to no directory.
    """

    def refuse(reason: str) -> ProxyStateError:
        return ProxyStateError(400, f"path {path!r} {reason}")

    if PurePosixPath(path).is_absolute():
        raise refuse("is absolute: it must be relative to --proxy-root")
    if ".." in PurePosixPath(path).parts:
        raise refuse("must not contain '..'")
    root = root.resolve()
    try:
        directory = (root / path).resolve(strict=True)
        files = [(directory / file).resolve() for file in (WEIGHTS_FILE, CONFIG_FILE)]
    except (OSError, RuntimeError, ValueError):  # missing, a loop of links, a NUL
        raise refuse("does not exist below --proxy-root") from None
    if not all(path.is_relative_to(root) for path in (directory, *files)):
        raise refuse("leads out of --proxy-root through a symbolic link")
    if not directory.is_dir():
        raise refuse("is not a directory: name the one that holds the checkpoint")
    return directory


def _worker_message(error: Exception) -> str:
    """The worker's message, without vLLM's text around it."""
    message = re.sub(r"^(Call to \w+ method failed: )+", "", str(error))
    frame = r"Worker failed with error '(.*)', please check the stack trace.*"
    framed = re.fullmatch(frame, message, re.DOTALL)
    return framed[1] if framed else message
