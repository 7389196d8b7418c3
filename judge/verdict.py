"""Verdicts on a pair of responses, from two label log-probabilities in each order.

A judge favours a position, so each pair is shown in both orders and both probabilities are averaged
(SELF-JUDGE): score of the first response = (p(A | 1, 2) + p(B | 2, 1)) / 2. With several principles
the majority of them decides, and the mean score where they are evenly split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

Winner = Literal["a", "b", "tie"]
Orders = tuple[float, float]
"""[p(first wins | shown first), p(first wins | shown second)], probabilities, not logs."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a pair by one principle. "First" is the pair's first response, called a."""

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
        """The response that wins in both orders; "tie" where they disagree or the margin is within the tie band."""
        margin = self.probability - 0.5
        if not self.consistent or margin == 0 or abs(margin) < self.tie_band:
            return "tie"
        return "a" if margin > 0 else "b"


@dataclass(frozen=True)
class PairResult:
    """The verdicts on a pair by all principles, and their aggregate."""

    by_principle: Mapping[str, Verdict]
    truncated: bool = False
    """A text was shortened to fit the judge's context; see `prompts.shorten`."""

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
        """The response that more principles prefer; the mean verdict's where the votes are even."""
        winners = [verdict.winner for verdict in self.by_principle.values()]
        votes = winners.count("a") - winners.count("b")
        return ("a" if votes > 0 else "b") if votes else self.mean.winner

    @property
    def first_advances(self) -> bool:
        """Whether the first response advances in a tournament, which must choose: only an exact 1/2 counts as a tie."""
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


def orders(shown_first: Sequence[float], shown_second: Sequence[float]) -> Orders:
    """From the logprobs of (" A", " B"), shown as (first, second) and as (second, first)."""
    return label_probability(*shown_first), label_probability(*reversed(shown_second))


def _sign(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)
