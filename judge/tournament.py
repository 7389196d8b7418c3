"""The ranking of N samples by comparisons of pairs; each round of comparisons is one batch.

`knock_out`    N - 1 comparisons, SELF-JUDGE's self-rejection: shuffle, pair up, the odd one out gets
               a bye, winners advance. Whoever had a bye plays first in the next round, so nobody gets
               two in a row.
`final_four`   N + 2 comparisons: a knock-out down to four, and all pairs of these. The winner of a
               knock-out may have won narrowly, or met none of the other good ones; here it meets three.
`round_robin`  all N (N - 1) / 2 pairs; ranked by their Bradley–Terry scores.

A strategy is a generator: it yields the pairs of a round, is sent their results, and returns the
ranking. The record holds every comparison, and `replay` finds the same ranking from it without a
model.
"""

import random
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from judge.bradley_terry import scores
from judge.verdict import Orders, PairResult, Verdict

Pair = tuple[int, int]
Games = Generator[list[Pair], Sequence[PairResult], list[int]]
"""Yields the pairs of each round, is sent their results, returns the ranking."""
TournamentStrategy = Callable[[int, int], Games]
"""(number of samples, seed) -> games."""
CompareRound = Callable[[list[Pair]], Awaitable[list[PairResult]]]


@dataclass(frozen=True)
class Comparison:
    """One comparison of two samples."""

    pair: Pair
    """Indices of the two samples; the first is the result's first."""
    orders: Mapping[str, Orders]
    """By principle: [p(first wins | shown first), p(first wins | shown second)]."""
    probability: float
    """That the first is better: the mean over principles and orders."""
    winner: int
    """Index of the preferred sample."""
    truncated: bool = False
    """A text was shortened to fit the judge's context."""


@dataclass(frozen=True)
class TournamentRecord:
    """Everything that happened. A sample of a knock-out that is unbeaten and in no pair of a round had a bye."""

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
    """The ranking: the winner, then the others; a later defeat ranks higher, and in a round a closer one."""
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
) -> Generator[list[Pair], Sequence[PairResult], tuple[list[int], list[int]]]:
    """Rounds until `until` samples stand; returns these and the beaten ones, the best first."""
    beaten: list[int] = []  # in order of defeat
    while len(standing) > until:
        games = min(len(standing) // 2, len(standing) - until)
        pairs = list(zip(standing[: 2 * games : 2], standing[1 : 2 * games : 2], strict=True))
        byes = standing[2 * games :]
        results = yield pairs
        winners = [_winner(pair, result) for pair, result in zip(pairs, results, strict=True)]
        losers = {
            sum(pair) - winner: abs(result.probability - 0.5)
            for pair, winner, result in zip(pairs, winners, results, strict=True)
        }
        beaten += sorted(losers, key=losers.__getitem__, reverse=True)
        standing = byes + winners
    return standing, beaten[::-1]


def _all_pairs(order: list[int]) -> Games:
    """One round of all pairs, the earlier shown first; returns the samples by their Bradley–Terry scores."""
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    results = yield pairs
    place = {sample: i for i, sample in enumerate(order)}
    won = {
        (place[a], place[b]): result.probability
        for (a, b), result in zip(pairs, results, strict=True)
    }
    strengths = scores(len(order), won)
    return sorted(order, key=lambda sample: strengths[place[sample]], reverse=True)


STRATEGIES: dict[str, TournamentStrategy] = {
    "knock-out": knock_out,
    "final-four": final_four,
    "round-robin": round_robin,
}


async def play(strategy: str, num: int, compare_round: CompareRound, seed: int) -> TournamentRecord:
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
            results = await compare_round(pairs)
            rounds.append(
                [comparison_of(pair, result) for pair, result in zip(pairs, results, strict=True)]
            )
            pairs = games.send(results)
    except StopIteration as end:
        return TournamentRecord(
            strategy=strategy, seed=seed, num=num, ranking=end.value, rounds=rounds
        )


def replay(record: Mapping[str, Any]) -> list[int]:
    """The ranking that a record (as JSON) leads to.

    Only strategy, seed, num and the orders' probabilities are used. Raises ValueError where the
    record's pairs are not the seed's, or it has too few or too many rounds.
    """
    games = STRATEGIES[record["strategy"]](record["num"], record["seed"])
    rounds = iter(record["rounds"])
    try:
        pairs = next(games)
        while True:
            recorded: list[Any] = next(rounds, [])
            if [tuple(comparison["pair"]) for comparison in recorded] != pairs:
                raise ValueError(f"the record's round is not the strategy's: expected {pairs}")
            pairs = games.send([_pair_result(comparison["orders"]) for comparison in recorded])
    except StopIteration as end:
        if next(rounds, None) is not None:
            raise ValueError("the record has another round after its last round") from None
        return end.value


def draw(num: int, seed: int) -> list[int]:
    """The samples in drawn order."""
    lots = random.Random(seed)  # Python promises the same random() in all versions, not shuffle()
    drawn = [lots.random() for _ in range(num)]
    return sorted(range(num), key=drawn.__getitem__)


def comparison_of(pair: Pair, result: PairResult) -> Comparison:
    """The record of one result."""
    return Comparison(
        pair=pair,
        orders={name: verdict.orders for name, verdict in result.by_principle.items()},
        probability=result.probability,
        winner=_winner(pair, result),
        truncated=result.truncated,
    )


def _pair_result(orders: Mapping[str, Any]) -> PairResult:
    return PairResult({name: Verdict(tuple(pair)) for name, pair in orders.items()})


def _winner(pair: Pair, result: PairResult) -> int:
    return pair[0] if result.first_advances else pair[1]
