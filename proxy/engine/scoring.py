"""Accept logits of the rows of a batch: one evaluation, whichever proxies the rows have.

A = rows that a proxy decides, K = candidates, T = tiles, P = loaded proxies.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import Candidates
from proxy.engine.device import to_device
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.network import Weights, accept_logits, score_single, state_features


class Tiles(NamedTuple):
    """The rows of several proxies as a rectangle: each of T tiles holds C rows of one proxy.

    With C = A / number of proxies, rounded up, a proxy has fewer than two tiles on average, and the
    rectangle fewer than 2 A places, however unevenly the rows are divided.
    """

    rows: Tensor  # [T, C] int64, index into A; unused places repeat the tile's first row
    places: Tensor  # [A] int64, where each row is in the flattened rectangle


def tiles_of(proxies: Sequence[ServedProxy], size: int) -> list[list[int]]:
    """The rows with these proxies, by proxy, at most `size` at a time."""
    members: dict[int, list[int]] = {}
    for row, proxy in enumerate(proxies):
        members.setdefault(proxy.slot, []).append(row)
    return [
        rows[start : start + size]
        for rows in members.values()
        for start in range(0, len(rows), size)
    ]


class ProxyScorer:
    """Scores each row by its own proxy."""

    def __init__(
        self, proxies: Sequence[ServedProxy], pool: ProxyPool, device: torch.device
    ) -> None:
        self._tiles: Tiles | None = None
        num_proxies = len({proxy.slot for proxy in proxies})
        if num_proxies == 1:
            self._weights, self._table = pool.single(proxies[0])
            return
        size = -(-len(proxies) // num_proxies)
        tiles = tiles_of(proxies, size)
        slots = [proxies[tile[0]].slot for tile in tiles]
        places = {row: t * size + c for t, tile in enumerate(tiles) for c, row in enumerate(tile)}
        padded = [[*tile, *[tile[0]] * (size - len(tile))] for tile in tiles]
        self._tiles = Tiles(
            to_device(padded, torch.int64, device),
            to_device([places[row] for row in range(len(proxies))], torch.int64, device),
        )
        weights, tables = pool.tensors
        index = to_device(slots, torch.int64, device)
        self._weights = Weights(*(part[index] for part in weights))
        self._table = tables.flatten(0, 1)  # [P V, 2W]
        first_rows = [[proxy.slot * tables.shape[1]] for proxy in proxies]
        self._first_rows = to_device(first_rows, torch.int64, device)  # [A, 1]

    @cached_property
    def state(self) -> Tensor | None:
        """[2W, H], what `project` multiplies with; None if the rows have several proxies."""
        return self._weights.state[0].mT.contiguous() if self._tiles is None else None

    def project(self, hidden: Tensor) -> Tensor:
        """`state_features` of each row, still to be divided by its norm: [A, H] float32 -> [A, 2W]."""
        if self._tiles is None:
            return torch.mm(hidden, self._weights.state[0])
        tiled = torch.bmm(hidden[self._tiles.rows], self._weights.state)
        return tiled.flatten(0, 1)[self._tiles.places]

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[A, H] and A rows of candidates -> [A, K], in one evaluation."""
        token_ids, logprobs = candidates
        if self._tiles is None:
            table_rows = F.embedding(token_ids, self._table)
            return score_single(self._weights, hidden, table_rows, logprobs)
        table_rows = F.embedding(token_ids + self._first_rows, self._table)  # [A, K, 2W]
        rows, places = self._tiles
        features = state_features(self._weights, hidden[rows])
        tiled = accept_logits(self._weights, features, table_rows[rows], logprobs[rows])
        return tiled.flatten(0, 1)[places]
