"""The rows of a batch that proxies decide, whichever proxies these are: one evaluation for all.

R = logits rows, A = those of them that a proxy decides, T = tiles, P = loaded proxies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import (
    Candidates,
    Decision,
    decide,
    draw_noise,
    narrower,
    nucleus,
    seeded_noise,
)
from proxy.network import Weights, accept_logits, score_alone, state_features
from proxy.pool import ProxyPool, ServedProxy

GREEDY_TEMPERATURE = 1e-5  # vLLM takes anything below for greedy


LOOP_REQUEST = np.dtype(
    [
        ("row", np.int64),
        ("proxy", np.int64),  # its place in the pool
        ("size", np.int64),  # candidates at most
        ("max_rejections", np.int64),
        ("key", np.int64),
        ("top_k", np.int64),  # 0 = off
        ("top_p", np.float32),  # 1 = off
        ("temperature", np.float32),  # of the nucleus
        ("sharpness", np.float32),
        ("strength", np.float32),
        ("greedy", np.bool_),
    ],
    align=True,
)
"""What `proxy.loop` reads of a request."""


@dataclass(frozen=True)
class Assignment:
    """What one request gets, settled when it is first seen."""

    req_id: str
    proxy: ServedProxy | None = None  # None = plain
    strength: float = 1.0
    max_rejections: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    key: int = 0  # of its noise, from its seed; a random one where it has none
    is_seeded: bool = False
    stop_ids: tuple[int, ...] = ()  # tokens that end the request
    slot: int = 0  # its row in the ledger's counts
    traced: bool = False
    shadowed: bool = True

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def divisor(self) -> float:
        """What the logits are divided by: for a proxy the temperature that it was trained at."""
        if self.proxy is not None:
            return self.proxy.config.temperature
        return 1.0 if self.is_greedy else self.temperature

    @property
    def sharpness(self) -> float:
        """The power of the nucleus' probabilities that candidates are proposed by."""
        return 1.0 if self.is_greedy else self.divisor / self.temperature

    @property
    def truncation(self) -> tuple[int, float]:
        """Top-k and top-p of its nucleus: the request's, but never wider than the proxy was trained with.

        What a proxy makes of candidates that training never showed it means nothing. A greedy
        request has none of its own.
        """
        if self.proxy is None:
            return self.top_k, self.top_p
        config = self.proxy.config
        if self.is_greedy:
            return config.top_k, config.top_p
        return narrower(self.top_k, config.top_k), min(self.top_p, config.top_p)

    @cached_property
    def packed(self) -> bytes:
        """A LOOP_REQUEST but for its first three fields, which the batch and the pool settle."""
        limits = self.max_rejections, self.key, *self.truncation
        settings = self.divisor, self.sharpness, self.strength, self.is_greedy
        return np.array((0, 0, 0, *limits, *settings), LOOP_REQUEST).tobytes()


class Settings(NamedTuple):
    """What the requests ask for, row by row, as the law takes it; None = the usual everywhere."""

    sizes: Tensor | None  # [A] int64, candidates at most
    strength: Tensor | None  # [A] float32
    max_rejections: Tensor  # [A] int64
    greedy: Tensor | None  # [A] bool
    temperature: Tensor | None  # [A] float32, of the nucleus
    sharpness: Tensor | None  # [A] float32
    top_k: Tensor | None  # [A] int64, V = off
    top_p: Tensor | None  # [A] float32
    keys: Tensor  # [A] int64
    is_seeded: Tensor  # [A] bool


class Tiles(NamedTuple):
    """The rows of several proxies as a rectangle: each of T tiles holds C rows of one proxy.

    With C = A / proxies, rounded up, there are fewer than two tiles a proxy, and so fewer than
    2 A places, however unevenly the rows are shared out.
    """

    rows: Tensor  # [T, C] int64, index into A; unused places repeat the tile's first row
    places: Tensor  # [A] int64, where each row is in the flattened rectangle


class Mixture:
    """Which proxy scores which row: one for all, or each its own."""

    def __init__(
        self, proxies: Sequence[ServedProxy], pool: ProxyPool, device: torch.device
    ) -> None:
        members: dict[int, list[int]] = {}
        for row, proxy in enumerate(proxies):
            members.setdefault(proxy.slot, []).append(row)
        self._tiles: Tiles | None = None
        if len(members) == 1:
            self._weights, self._table = pool.alone(proxies[0])
            return
        size = -(-len(proxies) // len(members))
        tiles: list[list[int]] = []
        slots: list[int] = []
        for slot, rows in members.items():
            for start in range(0, len(rows), size):
                tiles.append(rows[start : start + size])
                slots.append(slot)
        places = {row: t * size + c for t, tile in enumerate(tiles) for c, row in enumerate(tile)}
        padded = [[*tile, *[tile[0]] * (size - len(tile))] for tile in tiles]
        self._tiles = Tiles(
            to_device(padded, torch.int64, device),
            to_device([places[row] for row in range(len(proxies))], torch.int64, device),
        )
        assert pool.weights is not None and pool.tables is not None
        index = to_device(slots, torch.int64, device)
        self._weights = Weights(*(part[index] for part in pool.weights))
        self._table = pool.tables.flatten(0, 1)  # [P V, 2W]
        first_rows = [[proxy.slot * pool.tables.shape[1]] for proxy in proxies]
        self._first_rows = to_device(first_rows, torch.int64, device)  # [A, 1]

    @cached_property
    def state(self) -> Tensor | None:
        """[2W, H], what `project` multiplies with; None = not the same for all rows."""
        return self._weights.state[0].mT.contiguous() if self._tiles is None else None

    def project(self, hidden: Tensor) -> Tensor:
        """`state_features` of each row by its proxy, times the norm: [A, H] float32 -> [A, 2W]."""
        if self._tiles is None:
            return torch.mm(hidden, self._weights.state[0])
        tiled = torch.bmm(hidden[self._tiles.rows], self._weights.state)
        return tiled.flatten(0, 1)[self._tiles.places]

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[A, H] and A rows of candidates -> [A, K], in one evaluation."""
        token_ids, logprobs = candidates
        if self._tiles is None:
            return score_alone(self._weights, hidden, F.embedding(token_ids, self._table), logprobs)
        table_rows = F.embedding(token_ids + self._first_rows, self._table)  # [A, K, 2W]
        rows, places = self._tiles
        features = state_features(self._weights, hidden[rows])
        tiled = accept_logits(self._weights, features, table_rows[rows], logprobs[rows])
        return tiled.flatten(0, 1)[places]


Tracing = tuple[Candidates, Tensor, Tensor]
"""Candidates, accept logits [A, K], noise [A, 2, K]."""


class AlignedRows:
    """A rows, what their requests ask for, and how they are decided."""

    def __init__(
        self,
        rows: list[int],
        assignments: list[Assignment],
        pool: ProxyPool,
        device: torch.device,
        *,
        covers_batch: bool,  # the rows are all rows of the batch, in their order
    ) -> None:
        assert pool.tables is not None
        self.rows = rows
        self.assignments = assignments
        self.proxies = [a.proxy for a in assignments if a.proxy is not None]  # A of them
        self.any_traced = any(a.traced for a in assignments)
        self.index = None if covers_batch else to_device(rows, torch.int64, device)  # [A]
        self._pool = pool
        self._device = device
        self._vocab_size = pool.tables.shape[1]
        size_of = {p: min(p.config.max_candidates, self._vocab_size) for p in set(self.proxies)}
        self._sizes = [size_of[proxy] for proxy in self.proxies]
        self._most = max(size_of.values())
        if len(size_of) > 1:
            self._mixture = Mixture(self.proxies, pool, device)
        else:
            (alone,) = size_of
            self._mixture = pool.derived(alone, lambda: Mixture([alone], pool, device))

    def pick(self, x: Tensor) -> Tensor:
        """These rows of a tensor that has a row for every row of the batch: [R, ...] -> [A, ...]."""
        return x if self.index is None else x[self.index]

    def decide(
        self,
        logits: Tensor,  # [R, V] of any floating type
        hidden: Tensor,  # [R, H]
        positions: Tensor,  # [R or more] int, index of the token to be drawn
        *,
        tempered: bool,  # the logits have been divided by the temperature of the nucleus
    ) -> tuple[Decision, Tracing | None]:
        """The law for these rows, and all that entered it where a request wants a trace."""
        if self._device.type == "cpu" and not self.any_traced:
            hidden = self.pick(hidden)
            return self._loop.decide(logits, hidden, positions, tempered=tempered), None
        settings = self.settings
        candidates = self.candidates(logits, None if tempered else settings.temperature)
        scores = self.accept_logits(hidden, candidates)
        noise = self.noise(self.pick(positions[: len(logits)]), candidates.token_ids)
        decision = decide(
            candidates,
            scores,
            noise,
            strength=settings.strength,
            max_rejections=settings.max_rejections,
            sharpness=settings.sharpness,
            greedy=settings.greedy,
        )
        return decision, (candidates, scores, noise) if self.any_traced else None

    def candidates(self, logits: Tensor, temperature: Tensor | None) -> Candidates:
        """The nuclei of these rows, of [R, V] logits that are still to be divided by a temperature [A]."""
        settings = self.settings
        return nucleus(
            self.pick(logits),
            self._most,
            settings.top_k,
            settings.top_p,
            temperature=temperature,
            sizes=settings.sizes,
        )

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[R, H] and A rows of candidates -> [A, K]."""
        return self._mixture.accept_logits(self.pick(hidden), candidates)

    def noise(self, positions: Tensor, token_ids: Tensor) -> Tensor:
        """[A] positions and [A, K] candidates -> [A, 2, K]; seeded rows draw from their seed alone."""
        keys, is_seeded = self.settings.keys, self.settings.is_seeded
        # An accelerator draws fresh noise in one kernel, and a CPU's loop needs keys for all rows.
        num_seeded = sum(a.is_seeded for a in self.assignments)
        if self._device.type == "cpu" or num_seeded == len(self.rows):
            return seeded_noise(keys, positions, token_ids)
        rows, num_slots = token_ids.shape
        fresh = draw_noise(rows, num_slots, self._device)
        if num_seeded == 0:
            return fresh
        return torch.where(
            is_seeded.view(-1, 1, 1), seeded_noise(keys, positions, token_ids), fresh
        )

    @cached_property
    def settings(self) -> Settings:
        """Row by row, on the device."""

        def unless(usual: Any, data: list[Any], dtype: torch.dtype) -> Tensor | None:
            if all(value == usual for value in data):
                return None
            return to_device(data, dtype, self._device)

        asked = self.assignments
        truncations = [a.truncation for a in asked]
        return Settings(
            sizes=unless(self._most, self._sizes, torch.int64),
            strength=unless(1.0, [a.strength for a in asked], torch.float32),
            max_rejections=to_device([a.max_rejections for a in asked], torch.int64, self._device),
            greedy=unless(False, [a.is_greedy for a in asked], torch.bool),
            temperature=unless(1.0, [a.divisor for a in asked], torch.float32),
            sharpness=unless(1.0, [a.sharpness for a in asked], torch.float32),
            top_k=unless(
                self._vocab_size, [k or self._vocab_size for k, _ in truncations], torch.int64
            ),
            top_p=unless(1.0, [p for _, p in truncations], torch.float32),
            keys=to_device([a.key for a in asked], torch.int64, self._device),
            is_seeded=to_device([a.is_seeded for a in asked], torch.bool, self._device),
        )

    @cached_property
    def _loop(self) -> Any:
        from proxy.loop_rows import LoopRows  # compiles at its import; only a CPU needs it

        return LoopRows(self.rows, self.assignments, self._sizes, self._pool, self._mixture)


def to_device(data: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host data on the device, without waiting for the device."""
    tensor = torch.tensor(data, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
