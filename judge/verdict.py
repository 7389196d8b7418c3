"""Verdicts: what two label log-probabilities, one pair per order, say about two responses.

A judge favours a position, so each pair is shown in both orders and the two readings are averaged
(SELF-JUDGE): score of the first response = (p(A | 1, 2) + p(B | 2, 1)) / 2. With several principles
the majority of them decides, and the mean score where they are evenly split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

Winner = Literal["a", "b", "tie"]
Orders = tuple[float, float]
"""[p(first wins | shown first), p(first wins | shown second)], probabilities, not logs."""


@dataclass(frozen=True)
class Verdict:
    """One pair's verdict by one principle. "First" is the pair's first response, called a."""

    orders: Orders
    tie_band: float = 0.0
    """A probability nearer to 0.5 than this is a tie."""

    @property
    def probability(self) -> float:
        """That the first response is better: the mean of both orders."""
        return (self.orders[0] + self.orders[1]) / 2

    @property
    def consistent(self) -> bool:
        """Both orders prefer the same response, or neither prefers any."""
        return _sign(self.orders[0]) == _sign(self.orders[1])

    @property
    def winner(self) -> Winner:
        """The response that wins in both orders; "tie" where they disagree or leave it too open."""
        margin = self.probability - 0.5
        if not self.consistent or margin == 0 or abs(margin) < self.tie_band:
            return "tie"
        return "a" if margin > 0 else "b"


@dataclass(frozen=True)
class Ruling:
    """One pair's verdicts by all principles, and what they come to."""

    by_principle: Mapping[str, Verdict]
    truncated: bool = False
    """Something was cut for the judge to read it; see `prompts.shorten`."""

    @cached_property
    def mean(self) -> Verdict:
        """The mean of each order, with the first principle's tie band."""
        verdicts = list(self.by_principle.values())
        orders = fmean(v.orders[0] for v in verdicts), fmean(v.orders[1] for v in verdicts)
        return Verdict(orders, verdicts[0].tie_band)

    @property
    def probability(self) -> float:
        """That the first response is better: the mean over principles and orders."""
        return self.mean.probability

    @property
    def winner(self) -> Winner:
        """The response for which more principles are; of as many for either, the mean verdict's."""
        winners = [verdict.winner for verdict in self.by_principle.values()]
        votes = winners.count("a") - winners.count("b")
        return ("a" if votes > 0 else "b") if votes else self.mean.winner

    @property
    def first_goes_on(self) -> bool:
        """Who goes on in a tournament, which must choose: no verdict is a tie but an exact one."""
        votes = sum(_sign(verdict.probability) for verdict in self.by_principle.values())
        return votes > 0 if votes else self.probability >= 0.5


TIE: Orders = (0.5, 0.5)


def label_probability(logprob_a: float, logprob_b: float) -> float:
    """p(A) renormalised over the two labels: exp(a) / (exp(a) + exp(b)). Natural logs."""
    if logprob_a == logprob_b:  # both may be -inf
        return 0.5
    if logprob_a > logprob_b:
        return 1 / (1 + math.exp(logprob_b - logprob_a))
    odds = math.exp(logprob_a - logprob_b)
    return odds / (1 + odds)


def orders(shown_first: tuple[float, float], shown_second: tuple[float, float]) -> Orders:
    """From the logprobs of (" A", " B") as shown (first, second) and as shown (second, first)."""
    return label_probability(*shown_first), label_probability(*reversed(shown_second))


def _sign(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)
