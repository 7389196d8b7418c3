"""The knock-out: who meets whom, who wins, and that a receipt replays without a model."""

import asyncio
import json

import pytest

from judge.tournament import Receipt, bracket, knock_out, replay
from judge.verdict import Verdict


def play(
    num: int, strengths: list[float], seed: int
) -> tuple[Receipt, list[list[tuple[int, int]]]]:
    """A tournament before a judge that is sure that the higher strength wins."""
    asked: list[list[tuple[int, int]]] = []

    async def compare_round(pairs):
        asked.append(pairs)
        return [
            Verdict((0.9, 0.8)) if strengths[a] > strengths[b] else Verdict((0.2, 0.1))
            for a, b in pairs
        ]

    return asyncio.run(knock_out(num, compare_round, seed)), asked


@pytest.mark.parametrize("num", range(1, 18))
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_best_by_a_consistent_judge_wins(num, seed):
    strengths = [float((7 * i + seed) % 101) for i in range(num)]
    receipt, asked = play(num, strengths, seed)
    assert receipt.winner == strengths.index(max(strengths))
    # N - 1 comparisons in ceil(log2 N) rounds, one batch each.
    assert sum(map(len, asked)) == num - 1
    assert len(asked) == len(receipt.rounds) == (num - 1).bit_length()


def test_every_loser_is_out_and_everybody_plays():
    receipt, asked = play(11, [float(i) for i in range(11)], seed=3)
    losers = [
        index
        for played in receipt.rounds
        for comparison in played
        for index in comparison.pair
        if index != comparison.winner
    ]
    assert sorted([*losers, receipt.winner]) == list(range(11))
    assert {index for pairs in asked for pair in pairs for index in pair} == set(range(11))


def test_a_bye_plays_in_the_next_round():
    # 5 samples: two pairs and a bye; then the bye's pair and a bye; then the final.
    _, asked = play(5, [1.0, 2.0, 3.0, 4.0, 5.0], seed=0)
    (bye,) = set(range(5)) - {i for pair in asked[0] for i in pair}
    assert [len(pairs) for pairs in asked] == [2, 1, 1]
    assert bye in asked[1][0]


def test_the_seed_draws_the_bracket():
    # random.Random(7).random() gives 0.32, 0.15, 0.65, 0.07, 0.54, 0.37.
    assert next(bracket(6, 7)) == [(3, 1), (0, 5), (4, 2)]
    assert next(bracket(6, 7)) == next(bracket(6, 7))
    assert len({tuple(next(bracket(6, seed))) for seed in range(20)}) > 10


def test_an_undecided_pair_sends_its_first_on():
    async def undecided(pairs):
        return [Verdict((0.5, 0.5)) for _ in pairs]

    receipt = asyncio.run(knock_out(6, undecided, seed=7))
    assert [c.winner for c in receipt.rounds[0]] == [3, 0, 4]


@pytest.mark.parametrize("num", [1, 2, 3, 8, 13])
def test_a_receipt_replays_to_its_winner_from_json(num):
    receipt, _ = play(num, [float(i * i % 7) for i in range(num)], seed=num)
    assert replay(json.loads(json.dumps(receipt.as_json()))) == receipt.winner


def test_a_changed_verdict_changes_the_winner():
    receipt, _ = play(2, [1.0, 2.0], seed=0)
    changed = receipt.as_json()
    orders = changed["rounds"][0][0]["orders"]
    changed["rounds"][0][0]["orders"] = [1 - p for p in orders]
    assert replay(changed) != receipt.winner


def test_replay_refuses_what_does_not_fit_the_seed():
    receipt, _ = play(4, [1.0, 2.0, 3.0, 4.0], seed=0)
    with pytest.raises(ValueError, match="not the bracket's"):
        replay(receipt.as_json() | {"rounds": receipt.as_json()["rounds"][:1]})
    with pytest.raises(ValueError, match="after its final"):
        replay(receipt.as_json() | {"rounds": receipt.as_json()["rounds"] * 2})
    swapped = receipt.as_json()
    swapped["rounds"][0].reverse()
    with pytest.raises(ValueError, match="not the bracket's"):
        replay(swapped)


def test_no_samples():
    with pytest.raises(ValueError, match="at least one sample, got 0"):
        play(0, [], seed=0)
