"""A seeded knock-out over N samples: N - 1 comparisons, a whole round asked for at once.

Shuffle, pair up, the odd one out gets a bye, winners go on (SELF-JUDGE's self-rejection). Whoever
had a bye plays first in the next round, so nobody rests twice running. The receipt holds every
comparison, and `replay` finds the same winner from it without a model.
"""

import random
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from judge.verdict import Verdict

Pair = tuple[int, int]
CompareRound = Callable[[list[Pair]], Awaitable[list[Verdict]]]


@dataclass(frozen=True)
class Comparison:
    pair: Pair
    """Indices of the two samples; the first is the verdict's first."""
    orders: tuple[float, float]
    """[p(first wins | shown first), p(first wins | shown second)]."""
    probability: float
    """That the first is better: the mean of the orders."""
    winner: int
    """Index of the sample that goes on."""


@dataclass(frozen=True)
class Receipt:
    """What happened, in full. A sample not yet beaten that a round's pairs lack had a bye."""

    seed: int
    num: int
    winner: int
    rounds: list[list[Comparison]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def bracket(num: int, seed: int) -> Generator[list[Pair], Sequence[Verdict], int]:
    """The knock-out itself: yields a round's pairs, is sent their verdicts, returns the winner."""
    draw = random.Random(seed)  # Python promises the same random() in all versions, not shuffle()
    lots = [draw.random() for _ in range(num)]
    standing = sorted(range(num), key=lots.__getitem__)
    while len(standing) > 1:
        pairs = list(zip(standing[::2], standing[1::2], strict=False))
        bye = standing[2 * len(pairs) :]
        verdicts = yield pairs
        standing = bye + [_winner(p, v) for p, v in zip(pairs, verdicts, strict=True)]
    return standing[0]


async def knock_out(num: int, compare_round: CompareRound, seed: int) -> Receipt:
    """Run the knock-out of samples 0 .. num - 1; the receipt names the winner."""
    if num < 1:
        raise ValueError(f"a tournament needs at least one sample, got {num}")
    rounds: list[list[Comparison]] = []
    games = bracket(num, seed)
    try:
        pairs = next(games)
        while True:
            verdicts = await compare_round(pairs)
            rounds.append(
                [
                    Comparison(pair, verdict.orders, verdict.probability, _winner(pair, verdict))
                    for pair, verdict in zip(pairs, verdicts, strict=True)
                ]
            )
            pairs = games.send(verdicts)
    except StopIteration as end:
        return Receipt(seed=seed, num=num, winner=end.value, rounds=rounds)


def replay(receipt: Mapping[str, Any]) -> int:
    """The winner that a receipt (as JSON) leads to.

    Only seed, num and the orders' probabilities are believed. Raises ValueError where the receipt's
    pairs are not the seed's, or it has too few or too many rounds.
    """
    games = bracket(receipt["num"], receipt["seed"])
    rounds = iter(receipt["rounds"])
    try:
        pairs = next(games)
        while True:
            recorded: list[Any] = next(rounds, [])
            if [tuple(comparison["pair"]) for comparison in recorded] != pairs:
                raise ValueError(f"the receipt's round is not the bracket's: expected {pairs}")
            pairs = games.send([Verdict(tuple(c["orders"])) for c in recorded])
    except StopIteration as end:
        if next(rounds, None) is not None:
            raise ValueError("the receipt goes on after its final") from None
        return end.value


def _winner(pair: Pair, verdict: Verdict) -> int:
    return pair[0] if verdict.first_goes_on else pair[1]
