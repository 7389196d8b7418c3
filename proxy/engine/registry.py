"""The proxies that a worker has loaded: names, versions, shadows, retired versions.

A loaded version never changes. A name is bound to one version at a time, for requests that ask for
no other. A version that is unloaded while requests use it stays until they end.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from proxy.checkpoint import ProxyCheckpoint, ProxyError
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.network import Weights


class Registry:
    """Which proxies are in the pool, and under which names."""

    def __init__(self) -> None:
        self.pool = ProxyPool()
        self.retired: set[ServedProxy] = set()  # unloaded, perhaps still in use
        self._loaded: dict[tuple[str, str], ServedProxy] = {}  # by name and version
        self._bound: dict[str, ServedProxy] = {}  # by name: what requests get without a version
        self._descriptions: dict[ServedProxy, dict[str, Any]] = {}

    def load(
        self,
        name: str,
        directory: str,
        checkpoint: ProxyCheckpoint,
        make_tensors: Callable[
            [], tuple[Weights, Tensor]
        ],  # and the table [V, 2 width], on the device
        on_all_ranks: Callable[[Callable[[], None]], None],
        *,
        shadow: bool,
    ) -> dict[str, Any]:
        """Add a checkpoint that was read from `directory`, bind the name to it, return its description.

        `on_all_ranks` runs its argument on all ranks. If one of them fails, it raises ProxyError on
        all, and nothing has changed.

        Raises:
            ProxyError: as above, or the version is loaded already, and as a shadow where it is now
                to act, or the other way round.
        """
        proxy = self._loaded.get((name, checkpoint.version))
        if proxy is not None and self._descriptions[proxy]["shadow"] != shadow:
            raise ProxyError(
                f"Version {checkpoint.version} of {name!r} is loaded already, "
                f"{'to act' if shadow else 'as a shadow'}: unload it first."
            )
        if proxy is None:
            proxy = ServedProxy(name, checkpoint.version, checkpoint.config)
            try:
                on_all_ranks(lambda: self.pool.add(proxy, *make_tensors()))
            except ProxyError:
                self.pool.retain({*self._loaded.values(), *self.retired})
                raise
            self._loaded[name, checkpoint.version] = proxy
            self._descriptions[proxy] = {
                "name": name,
                "version": checkpoint.version,
                "directory": str(Path(directory).resolve()),
                "shadow": shadow,
                "max_candidates": checkpoint.config.max_candidates,
                "max_rejections": checkpoint.config.max_rejections,
                "temperature": checkpoint.config.temperature,
                "top_k": checkpoint.config.top_k,
                "top_p": checkpoint.config.top_p,
                "num_parameters": checkpoint.network.num_parameters(),
                "base": checkpoint.base.model_dump(),
                "training": checkpoint.training,
            }
        if not shadow:
            self._bound[name] = proxy
        return self._describe(proxy)

    def unload(self, name: str, version: str | None) -> dict[str, Any]:
        """Retire a version and return its description; `free` gives back its memory.

        Raises:
            ProxyError: it is not loaded.
        """
        versions = [v for n, v in self._loaded if n == name]
        if version is None and name in self._bound:
            version = self._bound[name].version
        elif version is None and len(versions) == 1:
            version = versions[0]
        proxy = self._loaded.pop((name, version or ""), None)
        if proxy is None:
            loaded = ", ".join(f"{n} ({v})" for n, v in sorted(self._loaded)) or "none"
            wanted = name if version is None else f"{name} ({version})"
            raise ProxyError(f"No proxy {wanted!r} is loaded. Loaded: {loaded}.")
        if self._bound.get(name) is proxy:
            del self._bound[name]
        self.retired.add(proxy)
        description = self._describe(proxy)
        del self._descriptions[proxy]
        return description

    def free(self, in_use: Collection[ServedProxy]) -> None:
        """Give back the memory of retired proxies that no request uses."""
        self.retired &= {*in_use}
        self.pool.retain({*self._loaded.values(), *self.retired})

    def find(self, name: str, version: str | None) -> ServedProxy | None:
        """The proxy that a request asks for; None if it is not loaded or a shadow."""
        proxy = self._bound.get(name) if version is None else self._loaded.get((name, version))
        return None if proxy is None or self._descriptions[proxy]["shadow"] else proxy

    def shadows(self) -> Sequence[ServedProxy]:
        """The proxies that only score, in the order of loading."""
        return [proxy for proxy in self._loaded.values() if self._descriptions[proxy]["shadow"]]

    def list(self) -> list[dict[str, Any]]:
        """The descriptions of all loaded versions."""
        return [self._describe(proxy) for proxy in self._loaded.values()]

    def _describe(self, proxy: ServedProxy) -> dict[str, Any]:
        return self._descriptions[proxy] | {"num_bytes": self.pool.num_bytes(proxy)}
