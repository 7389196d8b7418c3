"""Verdicts: what two label log-probabilities, one pair per order, say about two responses.

A judge favours a position, so each pair is shown in both orders and the two readings are averaged
(SELF-JUDGE): score of the first response = (p(A | 1, 2) + p(B | 2, 1)) / 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Winner = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Verdict:
    """One pair's verdict. "First" is the pair's first response, called a."""

    orders: tuple[float, float]
    """[p(first wins | shown first), p(first wins | shown second)], probabilities, not logs."""

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
        """The response that wins in both orders; "tie" where the orders disagree."""
        if not self.consistent or self.orders[0] == 0.5:
            return "tie"
        return "a" if self.orders[0] > 0.5 else "b"

    @property
    def first_goes_on(self) -> bool:
        """Who goes on in a tournament, which must choose: the higher score, or the first."""
        return self.probability >= 0.5


TIE = Verdict((0.5, 0.5))


def label_probability(logprob_a: float, logprob_b: float) -> float:
    """p(A) renormalised over the two labels: exp(a) / (exp(a) + exp(b)). Natural logs."""
    if logprob_a == logprob_b:  # both may be -inf
        return 0.5
    if logprob_a > logprob_b:
        return 1 / (1 + math.exp(logprob_b - logprob_a))
    odds = math.exp(logprob_a - logprob_b)
    return odds / (1 + odds)


def verdict(shown_first: tuple[float, float], shown_second: tuple[float, float]) -> Verdict:
    """From the logprobs of (" A", " B") as shown (first, second) and as shown (second, first)."""
    return Verdict((label_probability(*shown_first), label_probability(*reversed(shown_second))))


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict from one per principle: the mean of each order."""
    first = sum(v.orders[0] for v in verdicts) / len(verdicts)
    second = sum(v.orders[1] for v in verdicts) / len(verdicts)
    return Verdict((first, second))


def _sign(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)
