"""Which learned proxies there are, and which version of each serves.

    <proxy root>/.learn/ours/<version>/             checkpoint, and the rows that it was learned from
    <proxy root>/.learn/ours/learned.json           outcome of the last pass
    <proxy root>/.learn/mine/<hash of a key>/...    the same for each key's own proxy

A shared proxy serves as if POST /proxies had loaded it: the manifest names its version. A key's own proxy (`own`) is
loaded when its key asks for it. No other key can ask for it, or sees it.
"""

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from judge.feedback import Source
from proxy.checkpoint import CONFIG_FILE
from proxy.learned import versions
from server.access import Caller
from server.learned_proxy import STATE_FILE, LearnedProxy, Spec
from server.proxies import Proxies, ProxyStateError, ServedVersion
from server.proxy_manifest import Entry, ProxyManifest

logger = logging.getLogger(__name__)

DIRECTORY = ".learn"
MAX_LOADED = 64
"""Limit of loaded proxies of single keys; beyond it, the least recently used one is unloaded."""


class Learnable(NamedTuple):
    """A proxy that could be learned now."""

    spec: Spec
    proxy: LearnedProxy
    verdicts: int
    """In the database, for this proxy."""
    caller: str | None
    """Whose verdicts; None = everybody's."""


class LearnedProxies:
    """All of a server. Its methods run on the event loop."""

    def __init__(self, specs: Sequence[Spec], proxies: Proxies, manifest: ProxyManifest) -> None:
        """
        Args:
            specs: what the server learns by itself.
            proxies, manifest: what serves.
        """
        self.specs = {spec.name: spec for spec in specs}
        self.root = manifest.root / DIRECTORY
        self._proxies, self._manifest = proxies, manifest
        self._loaded: OrderedDict[str, None] = OrderedDict()  # of single keys, the last used last

    # --- requests ---

    async def wake(self, name: str, caller: Caller) -> None:
        """Load the current version of a key's own proxy, where it is not loaded."""
        spec = self.specs.get(name)
        if spec is None or not spec.own:
            return
        learned = self.of(spec, caller.identity)
        served_name, live = learned.served_name, learned.read().live
        if live is None:
            return await self._unload(served_name)
        bound = self._proxies.bound(served_name)
        if bound is None or bound.version != live:
            try:
                await self._proxies.load(served_name, learned.directory / live, version=live)
            except ProxyStateError as error:  # the earlier version answers, or the frozen LLM
                logger.error("%s is not loaded: %s", served_name, error)
        self._loaded[served_name] = None
        self._loaded.move_to_end(served_name)
        while len(self._loaded) > MAX_LOADED:
            await self._unload(next(iter(self._loaded)))

    def find(self, name: str, caller: Caller) -> ServedVersion | None:
        """The version that serves a caller under a learned name; None = none yet: the frozen LLM answers."""
        return self._proxies.bound(self.of(self.specs[name], caller.identity).served_name)

    def names(self) -> list[str]:
        """The names that requests may use, whether anything was learned yet or not."""
        return [spec.name for spec in self.specs.values() if not spec.shadow]

    def status(self, name: str, caller: Caller) -> dict[str, Any]:
        """The state of learning under a name; of keys' own proxies, the caller's.

        Raises:
            ProxyStateError: nothing is learned under this name.
        """
        spec = self.specs.get(name, Spec(name, ()))
        learned = self.of(spec, caller.identity)
        known = versions(learned.directory)
        if name not in self.specs and not known:
            raise ProxyStateError(
                404, f"nothing is learned as {name!r}: the server's --learn says what is"
            )
        live = self.live(learned)
        return {
            "object": "proxy.learning",
            "name": name,
            "from": ["own"] if spec.own else list(spec.sources),
            "live": live.name if live is not None else None,
            "last_pass": learned.read().outcome,
            "versions": [
                {"version": path.name, "path": str(path.relative_to(self._manifest.root))}
                | json.loads((path / CONFIG_FILE).read_bytes())["training"]
                for path in known
            ],
        }

    # --- learning ---

    async def serve(self, learned: LearnedProxy, version: Path | None) -> None:
        """Make this the version that serves; None = none any more.

        Raises:
            ProxyStateError: it could not be loaded.
        """
        name = learned.served_name
        if learned.owner is not None:
            live = version.name if version is not None else None
            learned.write(learned.read().model_copy(update={"live": live}))
            if version is None:
                await self._unload(name)
            elif self._proxies.bound(name) is not None:
                await self._proxies.load(name, version, version=version.name)
            return
        async with self._manifest.changing:
            entry = None
            if version is None:
                await self._unload(name)
            else:
                shadow = name in self.specs and self.specs[name].shadow
                await self._proxies.load(name, version, shadow=shadow, version=version.name)
                path = str(version.relative_to(self._manifest.root))
                entry = Entry(path=path, version=version.name, shadow=shadow)
            await asyncio.to_thread(self._manifest.change, name, entry)

    def live(self, learned: LearnedProxy) -> Path | None:
        """The checkpoint that serves now."""
        if learned.owner is not None:
            live = learned.read().live
            return learned.directory / live if live is not None else None
        bound = self._proxies.bound(learned.served_name)
        if bound is None:
            return None
        loaded = Path(bound.description["directory"])  # links are resolved
        version = learned.directory / loaded.name
        return version if version.resolve() == loaded else loaded

    def of(self, spec: Spec, caller: str | None) -> LearnedProxy:
        """The proxy of a name, or the caller's own."""
        owner = _hash(caller) if spec.own and caller else None
        return LearnedProxy(spec.name, self.root, owner)

    def learnable(
        self, spec: Spec, counts: Mapping[tuple[Source, str | None], int]
    ) -> list[Learnable]:
        """The proxies of a name: one, or one for each key with verdicts.

        Args:
            counts: the database's preferences by source and caller.
        """
        if not spec.own:
            total = sum(n for (source, _), n in counts.items() if source in spec.sources)
            return [Learnable(spec, self.of(spec, None), total, None)]
        return [
            Learnable(spec, self.of(spec, caller), count, caller)
            for (source, caller), count in counts.items()
            if source in spec.sources and caller is not None
        ]

    def on_disk(self) -> list[LearnedProxy]:
        """All that have files, whatever this server's --learn says."""
        shared = [
            LearnedProxy(path.parent.name, self.root) for path in self.root.glob(f"*/{STATE_FILE}")
        ]
        return shared + [
            LearnedProxy(path.parent.parent.name, self.root, path.parent.name)
            for path in self.root.glob(f"*/*/{STATE_FILE}")
        ]

    async def _unload(self, name: str) -> None:
        self._loaded.pop(name, None)
        if self._proxies.bound(name) is not None:
            with suppress(ProxyStateError):  # it is unloaded already
                await self._proxies.unload(name)


def _hash(caller: str) -> str:
    return hashlib.sha256(caller.encode()).hexdigest()[:16]
