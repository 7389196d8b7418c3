"""Who is best of N samples, from comparisons of pairs: a whole round of them is asked for at once.

`knock_out`    N - 1 comparisons, SELF-JUDGE's self-rejection: shuffle, pair up, the odd one out gets
               a bye, winners go on. Whoever had a bye plays first in the next round, so nobody rests
               twice running.
`final_four`   N + 2 comparisons: a knock-out down to four, and all pairs of these. A knock-out's
               winner may have won by a hair, or met none of the other good ones; here it meets three.
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
Games = Generator[list[Pair], Sequence[Ruling], list[int]]
"""Rounds of pairs, for their rulings, and at last the ranking."""
Strategy = Callable[[int, int], Games]
"""(number of samples, seed) -> games."""
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


def knock_out(num: int, seed: int) -> Games:
    """The ranking: the winner, then the others, the later beaten the better, the closer beaten the better."""
    standing, beaten = yield from _knock_out(draw(num, seed), until=1)
    return standing + beaten


def final_four(num: int, seed: int) -> Games:
    """The ranking: the last four by their Bradley–Terry scores, then the others as in a knock-out."""
    standing, beaten = yield from _knock_out(draw(num, seed), until=4)
    return (yield from _all_pairs(standing)) + beaten


def round_robin(num: int, seed: int) -> Games:
    """All pairs in one round; who is shown first is drawn."""
    return (yield from _all_pairs(draw(num, seed)))


def _knock_out(
    standing: list[int], until: int
) -> Generator[list[Pair], Sequence[Ruling], tuple[list[int], list[int]]]:
    """Rounds until so many stand; returns them and the beaten, the best first."""
    beaten: list[int] = []  # the first beaten first
    while len(standing) > until:
        games = min(len(standing) // 2, len(standing) - until)
        pairs = list(zip(standing[: 2 * games : 2], standing[1 : 2 * games : 2], strict=True))
        byes = standing[2 * games :]
        rulings = yield pairs
        winners = [_winner(pair, ruling) for pair, ruling in zip(pairs, rulings, strict=True)]
        losers = {
            sum(pair) - winner: abs(ruling.probability - 0.5)
            for pair, winner, ruling in zip(pairs, winners, rulings, strict=True)
        }
        beaten += sorted(losers, key=losers.__getitem__, reverse=True)
        standing = byes + winners
    return standing, beaten[::-1]


def _all_pairs(order: list[int]) -> Games:
    """One round of all pairs, the earlier shown first; returns the samples by their Bradley–Terry scores."""
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    rulings = yield pairs
    place = {sample: i for i, sample in enumerate(order)}
    won = {
        (place[a], place[b]): ruling.probability
        for (a, b), ruling in zip(pairs, rulings, strict=True)
    }
    found = scores(len(order), won)
    return sorted(order, key=lambda sample: found[place[sample]], reverse=True)


STRATEGIES: dict[str, Strategy] = {
    "knock-out": knock_out,
    "final-four": final_four,
    "round-robin": round_robin,
}


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
