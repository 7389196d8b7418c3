"""The rows of a batch that proxies decide: their settings as tensors, and the decision of a step.

R = logits rows, A = those of them that a proxy decides, K = candidates. A row that P proxies decide
together has P shares; S = shares of all rows.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxy.acceptance import Candidates, Decision, decide, nucleus
from proxy.engine.assignment import Assignment
from proxy.engine.device import to_device
from proxy.engine.pool import ProxyPool
from proxy.engine.scoring import ProxyScorer, tiles_of
from proxy.noise import draw_noise, seeded_noise


class Settings(NamedTuple):
    """The requests' settings, row by row, as `proxy.acceptance` takes them; None = default in all rows."""

    sizes: Tensor | None  # [A] int64, candidates at most
    strength: Tensor | None  # [A] float32, or [A, P] with 0 for a proxy that a row does not have
    max_rejections: Tensor  # [A] int64
    greedy: Tensor | None  # [A] bool
    temperature: Tensor | None  # [A] float32, of the nucleus
    sharpness: Tensor | None  # [A] float32
    top_k: Tensor | None  # [A] int64, V = off
    top_p: Tensor | None  # [A] float32
    keys: Tensor  # [A] int64
    is_seeded: Tensor  # [A] bool


class ScoredCandidates(NamedTuple):
    """Everything that the decisions of A rows are made from."""

    candidates: Candidates
    accept_logits: Tensor  # [A, K], or [A, P, K]
    noise: Tensor  # [A, 2, K]


class ProxiedRows:
    """A rows, the settings of their requests, and how they are decided."""

    def __init__(
        self,
        rows: list[int],
        assignments: list[Assignment],
        pool: ProxyPool,
        device: torch.device,
        *,
        covers_batch: bool,  # these are all rows of the batch, in its order
    ) -> None:
        assert pool.tables is not None
        self.rows = rows
        self.assignments = assignments
        self.proxies = [proxy for a in assignments for proxy, _ in a.shares]  # [S]
        has_several = len(self.proxies) > len(rows)
        self.max_shares = max(len(a.shares) for a in assignments) if has_several else 1  # P
        self.any_traced = any(a.traced for a in assignments)
        self.index = None if covers_batch else to_device(rows, torch.int64, device)  # [A]
        self._pool = pool
        self._device = device
        self._vocab_size = pool.tables.shape[1]
        self._sizes = [a.max_candidates for a in assignments]  # [A]
        self._max_size = max(self._sizes)
        if self._max_size > self._vocab_size:
            self._max_size = self._vocab_size
            self._sizes = [min(size, self._vocab_size) for size in self._sizes]

    def select_rows(self, x: Tensor) -> Tensor:
        """These rows of a tensor with one row for each row of the batch: [R, ...] -> [A, ...]."""
        return x if self.index is None else x[self.index]

    def decide(
        self,
        logits: Tensor,  # [R, V] of any floating type
        hidden: Tensor,  # [R, H]
        positions: Tensor,  # [R or more] int, index of the token to be drawn
        *,
        temperature_applied: bool,  # the logits are divided by the temperature of the nucleus
    ) -> tuple[Decision, ScoredCandidates | None]:
        """The decisions of these rows, and what they are made from if a request wants a trace."""
        if self._device.type == "cpu" and not self.any_traced:
            hidden = self.select_rows(hidden)
            decision = self._kernel_rows.decide(
                logits, hidden, positions, temperature_applied=temperature_applied
            )
            return decision, None
        if self._device.type == "cuda" and not self.any_traced and self.gpu_rows is not None:
            decision = self.gpu_rows.decide(
                logits, hidden, positions, temperature_applied=temperature_applied
            )
            return decision, None
        settings = self.settings
        candidates = self.candidates(logits, None if temperature_applied else settings.temperature)
        scores = self.accept_logits(hidden, candidates)
        noise = self.noise(self.select_rows(positions[: len(logits)]), candidates.token_ids)
        decision = decide(
            candidates,
            scores,
            noise,
            strength=settings.strength,
            max_rejections=settings.max_rejections,
            sharpness=settings.sharpness,
            greedy=settings.greedy,
        )
        scored = ScoredCandidates(candidates, scores, noise) if self.any_traced else None
        return decision, scored

    def candidates(self, logits: Tensor, temperature: Tensor | None) -> Candidates:
        """The nuclei of these rows, of [R, V] logits that are still to be divided by temperature [A]."""
        settings = self.settings
        return nucleus(
            self.select_rows(logits),
            self._max_size,
            settings.top_k,
            settings.top_p,
            temperature=temperature,
            sizes=settings.sizes,
        )

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[R, H] and A rows of candidates -> [A, K], or [A, P, K] if a row has several proxies."""
        hidden = self.select_rows(hidden)
        if self.max_shares == 1:
            return self._scorer.accept_logits(hidden, candidates)
        rows, ranks = self._shares
        of_shares = Candidates(*(part[rows] for part in candidates))
        scores = self._scorer.accept_logits(hidden[rows], of_shares)
        padded = scores.new_zeros(len(self.rows), self.max_shares, scores.shape[-1])
        padded[rows, ranks] = scores
        return padded

    @cached_property
    def _shares(self) -> Tensor:
        """Of each share its row among the A, and its place among the row's: [2, S] int64."""
        pairs = [
            (row, rank) for row, a in enumerate(self.assignments) for rank in range(len(a.shares))
        ]
        return to_device([*zip(*pairs, strict=True)], torch.int64, self._device)

    def noise(self, positions: Tensor, token_ids: Tensor) -> Tensor:
        """[A] positions and [A, K] candidates -> [A, 2, K]; seeded rows draw from their seed alone."""
        keys, is_seeded = self.settings.keys, self.settings.is_seeded
        # An accelerator draws fresh noise in one kernel. A CPU takes every row's key, as its
        # compiled loop does.
        num_seeded = sum(a.is_seeded for a in self.assignments)
        if self._device.type == "cpu" or num_seeded == len(self.rows):
            return seeded_noise(keys, positions, token_ids)
        rows, num_slots = token_ids.shape
        fresh = draw_noise(rows, num_slots, self._device)
        if num_seeded == 0:
            return fresh
        seeded = seeded_noise(keys, positions, token_ids)
        return torch.where(is_seeded.view(-1, 1, 1), seeded, fresh)

    @cached_property
    def _scorer(self) -> ProxyScorer:
        """Where all rows have the same proxy, one object serves every batch."""
        proxies, pool = self.proxies, self._pool
        if len({*proxies}) > 1:
            return ProxyScorer(proxies, pool, self._device)
        (proxy,) = {*proxies}
        return pool.derived(proxy, lambda: ProxyScorer([proxy], pool, self._device))

    @cached_property
    def settings(self) -> Settings:
        """Row by row, on the device."""

        def unless(default: Any, data: list[Any], dtype: torch.dtype) -> Tensor | None:
            if all(value == default for value in data):
                return None
            return to_device(data, dtype, self._device)

        rows = self.assignments
        strengths = [[strength for _, strength in a.shares] for a in rows]
        if self.max_shares == 1:
            strength = unless(1.0, [strength for (strength,) in strengths], torch.float32)
        else:
            padded = [[*of_row, *[0.0] * (self.max_shares - len(of_row))] for of_row in strengths]
            strength = to_device(padded, torch.float32, self._device)
        top_k = [a.truncation[0] or self._vocab_size for a in rows]
        return Settings(
            sizes=unless(self._max_size, self._sizes, torch.int64),
            strength=strength,
            max_rejections=to_device([a.max_rejections for a in rows], torch.int64, self._device),
            greedy=unless(False, [a.is_greedy for a in rows], torch.bool),
            temperature=unless(1.0, [a.divisor for a in rows], torch.float32),
            sharpness=unless(1.0, [a.sharpness for a in rows], torch.float32),
            top_k=unless(self._vocab_size, top_k, torch.int64),
            top_p=unless(1.0, [a.truncation[1] for a in rows], torch.float32),
            keys=to_device([a.key for a in rows], torch.int64, self._device),
            is_seeded=to_device([a.is_seeded for a in rows], torch.bool, self._device),
        )

    @cached_property
    def gpu_rows(self) -> Any:
        """The rows for the GPU's kernels; None where these do not apply, and tensor functions decide."""
        from proxy.gpu.kernel import TILE  # imports Triton
        from proxy.gpu.rows import KernelRows, supports

        if self.max_shares > 1:  # the kernels know one proxy a row
            return None
        weights, tables = self._pool.tensors
        # Of the whole pool: the kernels are compiled for it, not for every batch.
        max_candidates = max(proxy.config.max_candidates for proxy in self._pool.proxies)
        if not supports(max_candidates, tables.shape[-1] // 2, self._vocab_size):
            return None
        tiles = tiles_of(self.proxies, TILE.value)
        padded = [[*tile, *[-1] * (TILE.value - len(tile))] for tile in tiles]
        integers, floats = [], []
        for row, proxy, size, a in zip(
            self.rows, self.proxies, self._sizes, self.assignments, strict=True
        ):
            top_k, top_p = a.truncation
            top_k = top_k or self._vocab_size
            integers.append((row, proxy.slot, size, a.max_rejections, a.key, top_k, a.is_greedy))
            floats.append((top_p, a.divisor, a.sharpness, a.strength))
        return KernelRows(
            to_device(integers, torch.int64, self._device),
            to_device(floats, torch.float32, self._device),
            to_device(padded, torch.int32, self._device),
            weights,
            tables,
            max_candidates=max_candidates,
        )

    @cached_property
    def _kernel_rows(self) -> Any:
        from proxy.cpu.rows import KernelRows, proxy_arrays  # imports numba: only a CPU needs it

        return KernelRows(
            b"".join([assignment.packed for assignment in self.assignments]),
            self._pool.derived("arrays", lambda: proxy_arrays(*self._pool.tensors)),
            self._scorer,
            rows=self.rows,
            sizes=self._sizes,
            counts=None if self.max_shares == 1 else [len(a.shares) for a in self.assignments],
            slots=[proxy.slot for proxy in self.proxies],
        )


def warm_up(pool: ProxyPool, logits: Tensor, hidden: Tensor) -> None:
    """Compile what decides the rows of this pool now: it would delay the first request by seconds.

    Args:
        pool: of one proxy or more.
        logits, hidden: [R, V] and [R, H] as the LLM's head gives and takes them.
    """
    proxy = pool.proxies[0]
    assignments = [Assignment(f"warm-up {row}", proxy) for row in range(len(logits))]
    rows = ProxiedRows([*range(len(logits))], assignments, pool, logits.device, covers_batch=True)
    positions = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    for batch in {logits.dtype: logits, torch.float32: logits.float()}.values():
        rows.decide(batch, hidden, positions, temperature_applied=False)
