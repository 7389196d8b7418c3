"""All loaded proxies, stacked on the worker's device, so that one step can mix them freely.

P proxies share stacked tensors. Narrower ones are padded with zeros, which contribute nothing.
Loading and unloading build new tensors, so a load needs memory for both for a moment.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.network import ProxyConfig, Weights

_T = TypeVar("_T")


@dataclass(eq=False)
class ServedProxy:
    """A proxy on the worker's device: its name in requests, and its place in the pool."""

    name: str
    version: str
    config: ProxyConfig
    slot: int = -1  # its index in the stacked tensors


class _Entry(NamedTuple):
    proxy: ServedProxy
    weights: Weights  # P = 1
    table: Tensor  # [V, 2W]


class ProxyPool:
    """The stacked proxies. `weights` and `tables` are replaced, never changed."""

    def __init__(self) -> None:
        self.proxies: list[ServedProxy] = []  # in the order of their slots
        self.weights: Weights | None = None
        self.tables: Tensor | None = None  # [P, V, 2W]
        self._derived: dict[Any, Any] = {}

    def add(self, proxy: ServedProxy, weights: Weights, table: Tensor) -> None:
        """Add a proxy: its `Weights` with P = 1 and its candidate table [V, 2 width]."""
        self._stack([*self._entries(), _Entry(proxy, weights, table)])

    def retain(self, proxies: Collection[ServedProxy]) -> None:
        """Free all other proxies."""
        if any(proxy not in proxies for proxy in self.proxies):
            self._stack([entry for entry in self._entries() if entry.proxy in proxies])

    @property
    def tensors(self) -> tuple[Weights, Tensor]:
        """`weights` and `tables` of a pool that is not empty."""
        assert self.weights is not None and self.tables is not None
        return self.weights, self.tables

    def single(self, proxy: ServedProxy) -> tuple[Weights, Tensor]:
        """Views of one proxy: `Weights` with P = 1, and its table [V, 2W]."""
        weights, tables = self.tensors
        slot = proxy.slot
        return Weights(*(part[slot : slot + 1] for part in weights)), tables[slot]

    def derived(self, key: Any, make: Callable[[], _T]) -> _T:
        """The result of `make`, cached under `key` until the tensors change."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(_T, self._derived[key])

    def num_bytes(self, proxy: ServedProxy) -> int:
        """Memory that one proxy takes here."""
        weights, table = self.single(proxy)
        return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, table))

    def _entries(self) -> list[_Entry]:
        return [_Entry(proxy, *self.single(proxy)) for proxy in self.proxies]

    def _stack(self, entries: list[_Entry]) -> None:
        self._derived.clear()
        if not entries:
            self.proxies, self.weights, self.tables = [], None, None
            return
        width = max(entry.proxy.config.width for entry in entries)
        padded = [_padded_weights(entry.weights, width) for entry in entries]
        weights = Weights(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
        # The CPU kernel multiplies with its columns; others do not depend on the layout.
        weights = weights._replace(state=weights.state.mT.contiguous().mT)
        tables = torch.stack([_padded_halves(entry.table, width) for entry in entries])
        self.proxies = [entry.proxy for entry in entries]
        self.weights, self.tables = weights, tables
        for slot, proxy in enumerate(self.proxies):
            proxy.slot = slot


def _padded_weights(weights: Weights, width: int) -> Weights:
    # Negative after a wider proxy was removed: then only zeros are cut off.
    added = width - weights.product.shape[-1]
    return Weights(
        state=_padded_halves(weights.state, width),
        product=F.pad(weights.product, (0, added, 0, added)),
        logprob=F.pad(weights.logprob, (0, added)),
        score=F.pad(weights.score, (0, 0, 0, added)),
        bias=weights.bias,
    )


def _padded_halves(x: Tensor, width: int) -> Tensor:
    """[..., 2w] -> [..., 2 width], each half on its own."""
    halves = x.unflatten(-1, (2, -1))
    return F.pad(halves, (0, width - halves.shape[-1])).flatten(-2)
