"""All loaded proxies side by side on the worker's device, so that one step can mix them freely.

P proxies share stacked tensors; narrower ones are padded with zeros, which contribute nothing.
Loading and unloading build new tensors, so a load needs room for both for a moment.
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
    """A proxy on the worker's device: what stands for it in requests, and where its numbers are."""

    name: str
    version: str
    config: ProxyConfig
    slot: int = -1  # its place in the pool


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
        """Take in one more: `Weights` with P = 1 and its candidate table [V, 2 width]."""
        self._stack([*self._entries(), _Entry(proxy, weights, table)])

    def retain(self, proxies: Collection[ServedProxy]) -> None:
        """Free all but these."""
        if any(proxy not in proxies for proxy in self.proxies):
            self._stack([entry for entry in self._entries() if entry.proxy in proxies])

    def alone(self, proxy: ServedProxy) -> tuple[Weights, Tensor]:
        """Views of one proxy: `Weights` with P = 1, and its table [V, 2W]."""
        assert self.weights is not None and self.tables is not None
        slot = proxy.slot
        return Weights(*(part[slot : slot + 1] for part in self.weights)), self.tables[slot]

    def derived(self, key: Any, make: Callable[[], _T]) -> _T:
        """What `make` makes of the tensors, once for as long as these stay the same."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(_T, self._derived[key])

    def num_bytes(self, proxy: ServedProxy) -> int:
        """What one proxy occupies here."""
        weights, table = self.alone(proxy)
        return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, table))

    def _entries(self) -> list[_Entry]:
        return [_Entry(proxy, *self.alone(proxy)) for proxy in self.proxies]

    def _stack(self, entries: list[_Entry]) -> None:
        self._derived.clear()
        if not entries:
            self.proxies, self.weights, self.tables = [], None, None
            return
        width = max(entry.proxy.config.width for entry in entries)
        padded = [_padded_weights(entry.weights, width) for entry in entries]
        weights = Weights(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
        # Its columns are what a CPU's loop multiplies with, and others do not mind.
        weights = weights._replace(state=weights.state.mT.contiguous().mT)
        tables = torch.stack([_padded_halves(entry.table, width) for entry in entries])
        self.proxies = [entry.proxy for entry in entries]
        self.weights, self.tables = weights, tables
        for slot, proxy in enumerate(self.proxies):
            proxy.slot = slot


def _padded_weights(weights: Weights, width: int) -> Weights:
    # Negative where a wider proxy has gone: then only zeros are cut off.
    more = width - weights.product.shape[-1]
    return Weights(
        state=_padded_halves(weights.state, width),
        product=F.pad(weights.product, (0, more, 0, more)),
        logprob=F.pad(weights.logprob, (0, more)),
        score=F.pad(weights.score, (0, 0, 0, more)),
        bias=weights.bias,
    )


def _padded_halves(x: Tensor, width: int) -> Tensor:
    """[..., 2w] -> [..., 2 width], each half on its own."""
    halves = x.unflatten(-1, (2, -1))
    return F.pad(halves, (0, width - halves.shape[-1])).flatten(-2)
