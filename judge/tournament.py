"""Who is best of N samples, from comparisons of pairs: a whole round of them is asked for at once.

`knock_out`    N - 1 comparisons, SELF-JUDGE's self-rejection: shuffle, pair up, the odd one out gets
               a bye, winners go on. Whoever had a bye plays first in the next round, so nobody rests
               twice running.
`round_robin`  all N (N - 1) / 2 pairs; ranked by their Bradley–Terry scores.

A strategy is a generator: it yields a round's pairs, is sent their rulings, and returns the
ranking. The receipt holds every comparison, and `replay` finds the same ranking from it without a
model.
"""

import random
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from judge.bradley_terry import scores
from judge.verdict import Orders, Ruling, Verdict

Pair = tuple[int, int]
Strategy = Callable[[int, int], Generator[list[Pair], Sequence[Ruling], list[int]]]
"""(number of samples, seed) -> rounds of pairs, for their rulings, and at last the ranking."""
CompareRound = Callable[[list[Pair]], Awaitable[list[Ruling]]]


@dataclass(frozen=True)
class Comparison:
    pair: Pair
    """Indices of the two samples; the first is the ruling's first."""
    orders: Mapping[str, Orders]
    """By principle: [p(first wins | shown first), p(first wins | shown second)]."""
    probability: float
    """That the first is better: the mean over principles and orders."""
    winner: int
    """Index of the sample that is preferred."""
    truncated: bool = False
    """Something was cut for the judge to read it."""


@dataclass(frozen=True)
class Receipt:
    """What happened, in full. In a knock-out, a sample not yet beaten that a round's pairs lack had a bye."""

    strategy: str
    seed: int
    num: int
    ranking: list[int]
    """Indices of the samples, the best first."""
    rounds: list[list[Comparison]]

    @property
    def winner(self) -> int:
        return self.ranking[0]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"winner": self.winner}


def knock_out(num: int, seed: int) -> Generator[list[Pair], Sequence[Ruling], list[int]]:
    """The ranking: the winner, then the others, the later beaten the better, the closer beaten the better."""
    standing = draw(num, seed)
    out: list[int] = []  # the first beaten first
    while len(standing) > 1:
        pairs = list(zip(standing[::2], standing[1::2], strict=False))
        bye = standing[2 * len(pairs) :]
        rulings = yield pairs
        winners = [_winner(pair, ruling) for pair, ruling in zip(pairs, rulings, strict=True)]
        losers = {
            sum(pair) - winner: abs(ruling.probability - 0.5)
            for pair, winner, ruling in zip(pairs, winners, rulings, strict=True)
        }
        out += sorted(losers, key=losers.__getitem__, reverse=True)
        standing = bye + winners
    return standing + out[::-1]


def round_robin(num: int, seed: int) -> Generator[list[Pair], Sequence[Ruling], list[int]]:
    """All pairs in one round; who is shown first is drawn."""
    order = draw(num, seed)
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    rulings = yield pairs
    won = {pair: ruling.probability for pair, ruling in zip(pairs, rulings, strict=True)}
    found = scores(num, won)
    return sorted(order, key=found.__getitem__, reverse=True)


STRATEGIES: dict[str, Strategy] = {"knock-out": knock_out, "round-robin": round_robin}


async def play(strategy: str, num: int, compare_round: CompareRound, seed: int) -> Receipt:
    """Rank samples 0 .. num - 1.

    Raises ValueError without samples, KeyError for an unknown strategy, and what `compare_round` raises.
    """
    if num < 1:
        raise ValueError(f"a tournament needs at least one sample, got {num}")
    rounds: list[list[Comparison]] = []
    games = STRATEGIES[strategy](num, seed)
    try:
        pairs = next(games)
        while True:
            rulings = await compare_round(pairs)
            rounds.append(
                [_comparison(pair, ruling) for pair, ruling in zip(pairs, rulings, strict=True)]
            )
            pairs = games.send(rulings)
    except StopIteration as end:
        return Receipt(strategy=strategy, seed=seed, num=num, ranking=end.value, rounds=rounds)


def replay(receipt: Mapping[str, Any]) -> list[int]:
    """The ranking that a receipt (as JSON) leads to.

    Only strategy, seed, num and the orders' probabilities are believed. Raises ValueError where the
    receipt's pairs are not the seed's, or it has too few or too many rounds.
    """
    games = STRATEGIES[receipt["strategy"]](receipt["num"], receipt["seed"])
    rounds = iter(receipt["rounds"])
    try:
        pairs = next(games)
        while True:
            recorded: list[Any] = next(rounds, [])
            if [tuple(comparison["pair"]) for comparison in recorded] != pairs:
                raise ValueError(f"the receipt's round is not the strategy's: expected {pairs}")
            pairs = games.send([_ruling(comparison["orders"]) for comparison in recorded])
    except StopIteration as end:
        if next(rounds, None) is not None:
            raise ValueError("the receipt goes on after its last round") from None
        return end.value


def draw(num: int, seed: int) -> list[int]:
    """The samples in drawn order."""
    lots = random.Random(seed)  # Python promises the same random() in all versions, not shuffle()
    drawn = [lots.random() for _ in range(num)]
    return sorted(range(num), key=drawn.__getitem__)


def _comparison(pair: Pair, ruling: Ruling) -> Comparison:
    return Comparison(
        pair=pair,
        orders={name: verdict.orders for name, verdict in ruling.by_principle.items()},
        probability=ruling.probability,
        winner=_winner(pair, ruling),
        truncated=ruling.truncated,
    )


def _ruling(orders: Mapping[str, Any]) -> Ruling:
    return Ruling({name: Verdict(tuple(each)) for name, each in orders.items()})


def _winner(pair: Pair, ruling: Ruling) -> int:
    return pair[0] if ruling.first_goes_on else pair[1]
