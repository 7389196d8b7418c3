"""The proxies that a worker has loaded: by name and version, bound to names, shadows, retired ones.

A version once loaded never changes. A name is bound to one version at a time, for requests that do
not ask for another; a version that is unloaded while requests still use it stays until they end.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from proxy.checkpoint import LoadedProxy, ProxyError
from proxy.pool import ProxyPool, ServedProxy


class Registry:
    """Who is in the pool, and why."""

    def __init__(self) -> None:
        self.pool = ProxyPool()
        self.retired: set[ServedProxy] = set()  # unloaded, and perhaps still in use
        self._loaded: dict[tuple[str, str], ServedProxy] = {}  # by name and version
        self._bound: dict[str, ServedProxy] = {}  # by name: what requests get without a version
        self._descriptions: dict[ServedProxy, dict[str, Any]] = {}

    def load(
        self,
        name: str,
        directory: str,
        loaded: LoadedProxy,
        make_table: Callable[[], Tensor],  # -> [V, 2 width], on the device
        together: Callable[[Callable[[], None]], None],
        *,
        shadow: bool,
    ) -> dict[str, Any]:
        """Take in what has been read from a directory and bind the name to it; its description.

        `together` does what it is given on all ranks; where one of them fails it raises
        ProxyError on all, and nothing has changed. It is raised, too, if the same version acts
        already and is to be a shadow, or the other way.
        """
        proxy = self._loaded.get((name, loaded.version))
        if proxy is not None and self._descriptions[proxy]["shadow"] != shadow:
            raise ProxyError(
                f"Version {loaded.version} of {name!r} is loaded already, "
                f"{'to act' if shadow else 'as a shadow'}: unload it first."
            )
        if proxy is None:
            proxy = ServedProxy(name, loaded.version, loaded.config)
            try:
                together(lambda: self.pool.add(proxy, loaded.network.weights(), make_table()))
            except ProxyError:
                self.pool.retain({*self._loaded.values(), *self.retired})
                raise
            self._loaded[name, loaded.version] = proxy
            self._descriptions[proxy] = {
                "name": name,
                "version": loaded.version,
                "directory": str(Path(directory).resolve()),
                "shadow": shadow,
                "max_candidates": loaded.config.max_candidates,
                "max_rejections": loaded.config.max_rejections,
                "temperature": loaded.config.temperature,
                "top_k": loaded.config.top_k,
                "top_p": loaded.config.top_p,
                "num_parameters": loaded.network.num_parameters(),
                "base": loaded.base.model_dump(),
                "training": loaded.training,
            }
        if not shadow:
            self._bound[name] = proxy
        return self._describe(proxy)

    def unload(self, name: str, version: str | None) -> dict[str, Any]:
        """Retire a version and return its description; `free` gives back its memory.

        Raises ProxyError if it is not loaded.
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
        """Give back what retired proxies occupy that no request uses."""
        self.retired &= {*in_use}
        self.pool.retain({*self._loaded.values(), *self.retired})

    def find(self, name: str, version: str | None) -> ServedProxy | None:
        """The proxy that a request asks for; None if there is none that may act."""
        proxy = self._bound.get(name) if version is None else self._loaded.get((name, version))
        return None if proxy is None or self._descriptions[proxy]["shadow"] else proxy

    def shadows(self) -> Sequence[ServedProxy]:
        """Those that only score, the first loaded first."""
        return [proxy for proxy in self._loaded.values() if self._descriptions[proxy]["shadow"]]

    def list(self) -> list[dict[str, Any]]:
        """The descriptions of all that is loaded."""
        return [self._describe(proxy) for proxy in self._loaded.values()]

    def _describe(self, proxy: ServedProxy) -> dict[str, Any]:
        return self._descriptions[proxy] | {"num_bytes": self.pool.num_bytes(proxy)}
