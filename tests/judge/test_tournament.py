"""The knock-out: who meets whom, who wins, and that a record replays without a model."""

import asyncio
import json
import math

import pytest

from judge.tournament import (
    STRATEGIES,
    TournamentRecord,
    expected_gain,
    knock_out,
    play,
    replay,
)
from judge.verdict import PairResult, Verdict


def result(*orders: tuple[float, float]) -> PairResult:
    """By principles p, q, ..."""
    return PairResult(dict(zip("pqr", map(Verdict, orders), strict=False)))


def rank(
    num: int, strengths: list[float], seed: int, strategy: str = "knock-out"
) -> tuple[TournamentRecord, list[list[tuple[int, int]]]]:
    """A tournament with a judge that is sure that the higher strength wins."""
    rounds: list[list[tuple[int, int]]] = []

    async def compare_round(pairs, tokens):
        rounds.append(pairs)
        return [
            result((0.9, 0.8)) if strengths[a] > strengths[b] else result((0.2, 0.1))
            for a, b in pairs
        ]

    return asyncio.run(play(strategy, num, compare_round, seed)), rounds


@pytest.mark.parametrize("num", range(1, 18))
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_best_by_a_consistent_judge_wins(num, seed):
    strengths = [float((7 * i + seed) % 101) for i in range(num)]
    record, rounds = rank(num, strengths, seed)
    assert record.winner == strengths.index(max(strengths))
    # N - 1 comparisons in ceil(log2 N) rounds, one batch each.
    assert sum(map(len, rounds)) == num - 1
    assert len(rounds) == len(record.rounds) == (num - 1).bit_length()


def test_every_loser_is_out_and_everybody_plays():
    record, rounds = rank(11, [float(i) for i in range(11)], seed=3)
    losers = [
        index
        for comparisons in record.rounds
        for comparison in comparisons
        for index in comparison.pair
        if index != comparison.winner
    ]
    assert sorted([*losers, record.winner]) == list(range(11))
    assert {index for pairs in rounds for pair in pairs for index in pair} == set(range(11))


def test_a_bye_plays_in_the_next_round():
    # 5 samples: two pairs and a bye; then the bye's pair and a bye; then the final.
    _, rounds = rank(5, [1.0, 2.0, 3.0, 4.0, 5.0], seed=0)
    (bye,) = set(range(5)) - {i for pair in rounds[0] for i in pair}
    assert [len(pairs) for pairs in rounds] == [2, 1, 1]
    assert bye in rounds[1][0]


def test_the_seed_draws_the_bracket():
    # random.Random(7).random() gives 0.32, 0.15, 0.65, 0.07, 0.54, 0.37.
    assert next(knock_out(6, 7)).pairs == [(3, 1), (0, 5), (4, 2)]
    assert next(knock_out(6, 7)) == next(knock_out(6, 7))
    assert len({tuple(next(knock_out(6, seed)).pairs) for seed in range(20)}) > 10


def test_an_undecided_pair_sends_its_first_on():
    async def undecided(pairs, tokens):
        return [result((0.5, 0.5)) for _ in pairs]

    record = asyncio.run(play("knock-out", 6, undecided, seed=7))
    assert [comparison.winner for comparison in record.rounds[0]] == [3, 0, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num", [1, 2, 3, 8, 13])
def test_a_receipt_replays_to_its_ranking_from_json(num, strategy):
    record, _ = rank(num, [float(i * i % 7) for i in range(num)], num, strategy)
    drawn = 4 if (num, strategy) in ((8, "adaptive"), (13, "adaptive")) else num
    assert sorted(record.ranking) == list(range(drawn))
    as_json = json.loads(json.dumps(record.as_json()))
    assert replay(as_json) == record.ranking
    assert as_json["winner"] == record.ranking[0]


def test_several_principles_replay_to_the_majority():
    async def compare_round(pairs, tokens):
        # Two principles slightly prefer the first, the third strongly prefers the second.
        return [result((0.6, 0.6), (0.6, 0.6), (0.1, 0.1)) for _ in pairs]

    record = asyncio.run(play("knock-out", 2, compare_round, seed=0))
    (comparison,) = record.rounds[0]
    assert comparison.winner == comparison.pair[0] == record.winner
    assert comparison.probability == pytest.approx(1.3 / 3)
    assert replay(json.loads(json.dumps(record.as_json()))) == record.ranking


@pytest.mark.parametrize("num", [2, 3, 7, 16])
def test_a_round_robin_asks_for_all_pairs_once_and_ranks_all(num):
    strengths = [float((7 * i) % 17) for i in range(num)]
    record, rounds = rank(num, strengths, seed=5, strategy="round-robin")
    assert len(rounds) == 1
    assert len({frozenset(pair) for pair in rounds[0]}) == len(rounds[0]) == num * (num - 1) // 2
    assert record.ranking == sorted(range(num), key=lambda i: -strengths[i])


@pytest.mark.parametrize("num", [2, 4, 5, 6, 11, 16])
def test_the_last_four_of_a_final_four_all_meet(num):
    strengths = [float((7 * i) % 17) for i in range(num)]
    record, rounds = rank(num, strengths, seed=5, strategy="final-four")
    *earlier, last = rounds
    finalists = {index for pair in last for index in pair}
    assert (
        len({frozenset(pair) for pair in last})
        == len(last)
        == len(finalists) * (len(finalists) - 1) // 2
    )
    assert len(finalists) == min(num, 4)
    assert sum(map(len, earlier)) == num - len(finalists)
    assert {i for pairs in rounds for pair in pairs for i in pair} == set(range(num))
    assert record.ranking[:4] == sorted(finalists, key=lambda i: -strengths[i])
    assert record.winner == strengths.index(max(strengths))


def test_a_final_four_counts_all_its_games():
    """A sample that wins all its games narrowly is not the best, whatever the bracket says."""
    # With 4 samples no bracket is played: 2 beats all others narrowly, 0 beats 1 and 3 clearly.
    probabilities = {
        (2, 0): 0.55,
        (0, 1): 0.95,
        (0, 3): 0.95,
        (2, 1): 0.52,
        (2, 3): 0.52,
        (1, 3): 0.5,
    }

    async def compare_round(pairs, tokens):
        both_orders = probabilities | {(b, a): 1 - p for (a, b), p in probabilities.items()}
        return [result((both_orders[pair], both_orders[pair])) for pair in pairs]

    record = asyncio.run(play("final-four", 4, compare_round, seed=0))
    assert record.winner == 0


def test_the_later_beaten_ranks_higher_and_then_the_closer_beaten():
    # The pairs with seed 7 and 6 samples, as below, are (3, 1), (0, 5), (4, 2); the first wins.
    probabilities = {(3, 1): 0.9, (0, 5): 0.6, (4, 2): 0.8}

    async def compare_round(pairs, tokens):
        return [result((probabilities.get(pair, 0.7),) * 2) for pair in pairs]

    record = asyncio.run(play("knock-out", 6, compare_round, seed=7))
    # Then (3, 0) with a bye for 4, then (4, 3): the bye plays first.
    assert [
        [comparison.pair for comparison in comparisons] for comparisons in record.rounds[1:]
    ] == [[(3, 0)], [(4, 3)]]
    assert record.ranking == [4, 3, 0, 5, 2, 1]


def adaptive_rounds(num, probability):
    """The rounds of an adaptive tournament, with p(a beats b) = probability(a, b); and its record."""
    rounds = []

    async def compare_round(pairs, tokens):
        rounds.append((pairs, tokens))
        return [result((probability(a, b),) * 2) for a, b in pairs]

    return rounds, asyncio.run(play("adaptive", num, compare_round, seed=0, prefix_tokens=32))


def test_an_adaptive_tournament_draws_no_more_when_its_best_is_far_ahead():
    # Sample 2 wins all: the next is unlikely to beat it.
    rounds, record = adaptive_rounds(64, lambda a, b: 0.99 if a == 2 else 0.01 if b == 2 else 0.5)
    assert rounds == [([(0, 1), (2, 3)], 32), ([(0, 2)], 64)]
    assert record.ranking[0] == record.winner == 2
    assert sorted(record.ranking) == [0, 1, 2, 3]
    assert record.rounds[1][0].tokens == 64


def test_an_adaptive_tournament_goes_on_while_the_next_may_be_better():
    """Three of four samples are good, and equally so; of equals the first advances."""
    strengths = [4.0 * (i % 4 > 0) for i in range(7)]
    rounds, record = adaptive_rounds(
        7, lambda a, b: 1 / (1 + math.exp(strengths[b] - strengths[a]))
    )
    # Waves of 4 and 3; the second has the best of the first at its end.
    assert rounds == [
        ([(0, 1), (2, 3)], 32), ([(1, 2)], 64),
        ([(4, 5), (6, 1)], 32), ([(5, 6)], 64),
    ]  # fmt: skip
    assert record.winner == 5
    assert sorted(record.ranking) == list(range(7))


@pytest.mark.parametrize(
    ("strengths", "best", "gain"),
    [
        # Mean 0 and variance (1 + 0) / 4, the best at 0: E max(0, sigmoid(0.5 z) - 1/2).
        ([0.0] * 4, 0, 0.0482),
        # Mean -1, variance (1 + 12) / 4, the best at 2: E max(0, sigmoid(1.803 z - 3) - 1/2).
        ([2.0, -2.0, -2.0, -2.0], 0, 0.0077),
    ],
)
def test_the_expected_gain_by_monte_carlo(strengths, best, gain):
    assert expected_gain(strengths, best) == pytest.approx(gain, abs=0.002)


def test_a_changed_verdict_changes_the_winner():
    record, _ = rank(2, [1.0, 2.0], seed=0)
    changed = record.as_json()
    orders = changed["rounds"][0][0]["orders"]
    orders["p"] = [1 - p for p in orders["p"]]
    assert replay(changed) == record.ranking[::-1]


def test_replay_refuses_what_does_not_fit_the_seed():
    record, _ = rank(4, [1.0, 2.0, 3.0, 4.0], seed=0)
    with pytest.raises(ValueError, match="not the strategy's"):
        replay(record.as_json() | {"rounds": record.as_json()["rounds"][:1]})
    with pytest.raises(ValueError, match="after its last round"):
        replay(record.as_json() | {"rounds": record.as_json()["rounds"] * 2})
    swapped = record.as_json()
    swapped["rounds"][0].reverse()
    with pytest.raises(ValueError, match="not the strategy's"):
        replay(swapped)


def test_no_samples():
    with pytest.raises(ValueError, match="at least one sample, got 0"):
        rank(0, [], seed=0)
