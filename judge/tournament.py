"""The ranking of N samples by comparisons of pairs; each round of comparisons is one batch.

`knock_out`    N - 1 comparisons, SELF-JUDGE's self-rejection: shuffle, pair up, the odd one out gets
               a bye, winners advance. Whoever had a bye plays first in the next round, so nobody gets
               two in a row.
`final_four`   N + 2 comparisons: a knock-out down to four, and all pairs of these. The winner of a
               knock-out may have won narrowly, or met none of the other good ones; here it meets three.
`round_robin`  all N (N - 1) / 2 pairs; ranked by their Bradley–Terry scores.
`adaptive`     N - 1 comparisons at most. Samples are drawn when they are first compared: no more when
               the next one cannot be expected to win.
`one-call`     no comparison of pairs: the judge chooses among all N at once, in several orders (`judge.choice`).

A strategy of pairs is a generator: it yields a round, is sent the results, and returns the ranking. The record
holds every comparison, and `replay` finds the same ranking from it without a model.
"""

import math
import random
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from judge.bradley_terry import scores
from judge.choice import ChoiceReading, rank_readings, rotate
from judge.verdict import Orders, PairResult, Verdict

Pair = tuple[int, int]


class Round(NamedTuple):
    """Comparisons that do not wait for one another."""

    pairs: list[Pair]
    depth: int = 0
    """How many rounds the samples have won, those of them that came last."""


Games = Generator[Round, Sequence[PairResult], list[int]]
"""Yields each round, is sent its results, returns the ranking."""
TournamentStrategy = Callable[[int, int], Games]
"""(number of samples, seed) -> games."""
CompareRound = Callable[[list[Pair], int | None], Awaitable[list[PairResult]]]
"""(pairs, tokens of each sample to read; None = all of it) -> their results."""

ReadChoices = Callable[[list[list[int]]], Awaitable[list[ChoiceReading]]]
"""Orders of the samples -> the choice among them as shown in each."""
ONE_CALL = "one-call"

FIRST_WAVE = 4
"""Samples that `adaptive` draws at first; then it doubles them each time."""
WORTHWHILE = 0.03
"""`adaptive` draws more while the next sample is expected to raise the probability of winning by at least this."""
PRIOR_DEVIATION = 1.0
"""What one more observation is away from the mean, in nats: of few samples, all may be alike by chance."""


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
    tokens: int | None = None
    """How much of each sample was read; None = all of it."""


@dataclass(frozen=True)
class TournamentRecord:
    """Everything that happened. A sample of a knock-out that is unbeaten and in no pair of a round had a bye."""

    strategy: str
    seed: int
    num: int
    ranking: list[int]
    """Indices of the samples, the best first; without those that were never drawn."""
    rounds: list[list[Comparison]]
    readings: list[ChoiceReading] = field(default_factory=list)
    """Of `one-call`, instead of rounds."""

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


def adaptive(num: int, seed: int) -> Games:
    """The ranking: the winner, then the others that were drawn, by their Bradley–Terry scores.

    The samples come in waves, each as large as all before it. A wave plays a knock-out, whose winner meets the best of
    those before. Everyone has the same chance in advance, so that nothing needs to be drawn by `seed`.
    """
    del seed
    best: list[int] = []
    drawn, won = 0, dict[Pair, float]()
    while drawn < num and (not best or expected_gain(scores(drawn, won), best[0]) >= WORTHWHILE):
        wave = range(drawn, min(num, max(FIRST_WAVE, 2 * drawn)))
        drawn, depth, standing = wave.stop, 0, [*wave, *best]
        while len(standing) > 1:
            pairs = list(zip(standing[::2], standing[1::2], strict=False))
            results = yield Round(pairs, depth)
            won |= {pair: r.probability for pair, r in zip(pairs, results, strict=True)}
            winners = [_winner(pair, result) for pair, result in zip(pairs, results, strict=True)]
            standing, depth = winners + standing[2 * len(pairs) :], depth + 1
        best = standing
    strengths = scores(drawn, won)
    others = (sample for sample in range(drawn) if sample != best[0])
    return best + sorted(others, key=strengths.__getitem__, reverse=True)


def expected_gain(strengths: Sequence[float], best: int) -> float:
    """E max(0, P(the next sample beats the best) - 1/2), the next one's strength being normal.

    Its mean is that of the samples so far. So is its variance, with one more observation at `PRIOR_DEVIATION`.

    Args:
        strengths: Bradley–Terry scores of the samples so far, natural logs
        best: index of the best
    """
    mean = fmean(strengths)
    squares = PRIOR_DEVIATION**2 + sum((strength - mean) ** 2 for strength in strengths)
    spread = math.sqrt(squares / len(strengths))
    next_one = NormalDist(mean - strengths[best], spread)
    chances = (1 / (1 + math.exp(-next_one.inv_cdf(level))) for level in _LEVELS)
    return fmean(max(0.0, chance - 0.5) for chance in chances)


_LEVELS = [(i + 0.5) / 32 for i in range(32)]
"""Quantiles over which `expected_gain` averages."""


def _knock_out(
    standing: list[int], until: int
) -> Generator[Round, Sequence[PairResult], tuple[list[int], list[int]]]:
    """Rounds until `until` samples stand; returns these and the beaten ones, the best first."""
    beaten: list[int] = []  # in order of defeat
    depth = 0
    while len(standing) > until:
        games = min(len(standing) // 2, len(standing) - until)
        pairs = list(zip(standing[: 2 * games : 2], standing[1 : 2 * games : 2], strict=True))
        byes = standing[2 * games :]
        results = yield Round(pairs, depth)
        depth += 1
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
    results = yield Round(pairs)
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
    "adaptive": adaptive,
}


async def play(
    strategy: str,
    num: int,
    compare_round: CompareRound,
    seed: int,
    prefix_tokens: int | None = None,
) -> TournamentRecord:
    """Rank samples 0 .. num - 1.

    With `prefix_tokens` the first round reads so many tokens of each sample, the next twice as many, and so on.

    Raises ValueError without samples, KeyError for an unknown strategy, and what `compare_round` raises.
    """
    if num < 1:
        raise ValueError(f"a tournament needs at least one sample, got {num}")
    rounds: list[list[Comparison]] = []
    games = STRATEGIES[strategy](num, seed)
    try:
        this = next(games)
        while True:
            tokens = prefix_tokens << this.depth if prefix_tokens else None
            results = await compare_round(this.pairs, tokens)
            rounds.append(comparisons_of(this.pairs, results, tokens))
            this = games.send(results)
    except StopIteration as end:
        return TournamentRecord(
            strategy=strategy, seed=seed, num=num, ranking=end.value, rounds=rounds
        )


async def choose(
    num: int, read: ReadChoices, seed: int, rotations: int | None = None
) -> TournamentRecord:
    """Rank samples 0 .. num - 1 by choices among all of them: the order that `seed` draws, rotated.

    Args:
        rotations: number of readings; None = `num`, in which every sample stands once at every position.

    Raises ValueError without samples, and what `read` raises.
    """
    if num < 1:
        raise ValueError(f"a choice needs at least one sample, got {num}")
    shown = rotate(draw(num, seed), min(num, rotations or num))
    readings = await read(shown) if num > 1 else []
    ranking = rank_readings(readings) if readings else [0]
    return TournamentRecord(ONE_CALL, seed, num, ranking, rounds=[], readings=readings)


def replay(record: Mapping[str, Any]) -> list[int]:
    """The ranking that a record (as JSON) leads to.

    Only strategy, seed, num and the recorded probabilities are used. Raises ValueError where the
    record's pairs are not the seed's, or it has too few or too many rounds.
    """
    if record["strategy"] == ONE_CALL:
        return _replay_choices(record)
    games = STRATEGIES[record["strategy"]](record["num"], record["seed"])
    rounds = iter(record["rounds"])
    try:
        this = next(games)
        while True:
            recorded: list[Any] = next(rounds, [])
            if [tuple(comparison["pair"]) for comparison in recorded] != this.pairs:
                raise ValueError(f"the record's round is not the strategy's: expected {this.pairs}")
            this = games.send([_pair_result(comparison["orders"]) for comparison in recorded])
    except StopIteration as end:
        if next(rounds, None) is not None:
            raise ValueError("the record has another round after its last round") from None
        return end.value


def _replay_choices(record: Mapping[str, Any]) -> list[int]:
    readings = [ChoiceReading(**reading) for reading in record["readings"]]
    shown = rotate(draw(record["num"], record["seed"]), max(1, len(readings)))
    if record["num"] > 1 and [reading.order for reading in readings] != shown:
        raise ValueError(f"the record's orders are not the seed's: expected {shown}")
    return rank_readings(readings) if readings else [0]


def draw(num: int, seed: int) -> list[int]:
    """The samples in drawn order."""
    lots = random.Random(seed)  # Python promises the same random() in all versions, not shuffle()
    drawn = [lots.random() for _ in range(num)]
    return sorted(range(num), key=drawn.__getitem__)


def comparisons_of(
    pairs: Sequence[Pair], results: Sequence[PairResult], tokens: int | None
) -> list[Comparison]:
    """The record of a round's results."""
    return [
        Comparison(
            pair=pair,
            orders={name: verdict.orders for name, verdict in result.by_principle.items()},
            probability=result.probability,
            winner=_winner(pair, result),
            truncated=result.truncated,
            tokens=tokens,
        )
        for pair, result in zip(pairs, results, strict=True)
    ]


def _pair_result(orders: Mapping[str, Any]) -> PairResult:
    return PairResult({name: Verdict(tuple(pair)) for name, pair in orders.items()})


def _winner(pair: Pair, result: PairResult) -> int:
    return pair[0] if result.first_advances else pair[1]
