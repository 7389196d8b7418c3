"""How one request is sampled: resolved once, when the worker first sees it."""

import sys
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from proxy.acceptance import narrower_top_k
from proxy.engine.pool import ServedProxy

GREEDY_TEMPERATURE = 1e-5
"""vLLM treats every temperature below as greedy."""


@dataclass
class Counts:
    """What was decided for one request, as far as the steps are added up."""

    tokens: int = 0  # emitted
    proposed: int = 0  # candidates put to the proxy, the accepted ones included
    forced: int = 0  # tokens emitted although the proxy accepted none
    closed: bool = False  # the request has ended, or its counts were taken: nothing more counts

    def add(self, tokens: int, proposed: int, forced: int) -> None:
        self.tokens += tokens
        self.proposed += proposed
        self.forced += forced


@dataclass(frozen=True)
class Assignment:
    """The settings of one request, and what was counted for it."""

    req_id: str
    proxy: ServedProxy | None = None  # None = vLLM's own sampling
    strength: float = 1.0
    max_rejections: int = 0
    partners: tuple[tuple[ServedProxy, float], ...] = ()  # further proxies and their strengths
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    key: int = 0  # of its noise: from its seed, or random
    is_seeded: bool = False
    stop_ids: tuple[int, ...] = ()  # tokens that end the request
    max_tokens: int = sys.maxsize
    traced: bool = False
    shadowed: bool = True  # whether shadow proxies score it
    counts: Counts = field(default_factory=Counts, compare=False)

    @cached_property
    def shares(self) -> tuple[tuple[ServedProxy, float], ...]:
        """The proxies that decide together, and the strength of each; () = none does."""
        return () if self.proxy is None else ((self.proxy, self.strength), *self.partners)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def divisor(self) -> float:
        """What the logits are divided by. With a proxy: the temperature of its training.

        Proxies that decide together were trained at the same.
        """
        if self.proxy is not None:
            return self.proxy.config.temperature
        return 1.0 if self.is_greedy else self.temperature

    @property
    def sharpness(self) -> float:
        """T0 / T: candidates are proposed by their probability to this power."""
        return 1.0 if self.is_greedy else self.divisor / self.temperature

    @property
    def truncation(self) -> tuple[int, float]:
        """Top-k and top-p of the nucleus: the request's, but never wider than in any proxy's training.

        A proxy's scores mean nothing for candidates that its training never showed. Greedy requests
        have no top-k and top-p of their own, because vLLM switches them off.
        """
        has_own = not (self.shares and self.is_greedy)
        top_k, top_p = (self.top_k, self.top_p) if has_own else (0, 1.0)
        for proxy, _ in self.shares:
            top_k = narrower_top_k(top_k, proxy.config.top_k)
            top_p = min(top_p, proxy.config.top_p)
        return top_k, top_p

    @cached_property
    def max_candidates(self) -> int:
        """As many as every proxy takes; not without a proxy."""
        return min(proxy.config.max_candidates for proxy, _ in self.shares)

    @cached_property
    def packed(self) -> bytes:
        """The request as the CPU kernel's REQUEST, one for each proxy; the batch sets the first three fields."""
        from proxy.cpu.kernel import REQUEST  # imports numba: only a CPU needs it

        limits = len(self.shares), self.max_rejections, self.key, *self.truncation
        settings = self.divisor, self.sharpness
        rows = [
            (0, 0, 0, *limits, *settings, strength, self.is_greedy) for _, strength in self.shares
        ]
        return np.array(rows, REQUEST).tobytes()
