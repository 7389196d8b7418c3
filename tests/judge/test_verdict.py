"""Verdict maths, with numbers worked out by hand."""

import math

import pytest

from judge.verdict import TIE, PairResult, Verdict, label_probability, orders


def test_label_probability_is_renormalised_over_the_two_labels():
    # p(A) = 0.3, p(B) = 0.1, the rest of the vocabulary has 0.6: 0.3 / 0.4.
    assert label_probability(math.log(0.3), math.log(0.1)) == pytest.approx(0.75, abs=1e-12)
    assert label_probability(math.log(0.1), math.log(0.3)) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize(
    ("logprob_a", "logprob_b", "expected"),
    [
        (0.0, -2000.0, 1.0),  # exp would overflow the odds
        (-2000.0, 0.0, 0.0),
        (-9999.0, -9999.0, 0.5),
        (-math.inf, -1.0, 0.0),
        (-1.0, -math.inf, 1.0),
        (-math.inf, -math.inf, 0.5),
    ],
)
def test_label_probability_at_the_extremes(logprob_a, logprob_b, expected):
    assert label_probability(logprob_a, logprob_b) == expected


def test_both_orders_are_averaged():
    # Shown first: p(A) = 0.8. Shown second, the first response is B: p(B) = 0.4.
    verdict = Verdict(orders((math.log(0.8), math.log(0.2)), (math.log(0.6), math.log(0.4))))
    assert verdict.orders == pytest.approx((0.8, 0.4))
    assert verdict.probability == pytest.approx(0.6)
    assert not verdict.consistent
    assert verdict.winner == "tie"
    assert PairResult({"x": verdict}).first_advances


@pytest.mark.parametrize(
    ("probabilities", "winner", "consistent", "first_advances"),
    [
        ((0.9, 0.6), "a", True, True),
        ((0.4, 0.1), "b", True, False),
        ((0.9, 0.2), "tie", False, True),
        ((0.6, 0.1), "tie", False, False),
        ((0.5, 0.5), "tie", True, True),
        ((0.5, 0.7), "tie", False, True),
    ],
)
def test_winner(probabilities, winner, consistent, first_advances):
    verdict = Verdict(probabilities)
    assert (verdict.winner, verdict.consistent) == (winner, consistent)
    assert PairResult({"x": verdict}).first_advances is first_advances
    assert PairResult({"x": verdict}).winner == winner


def test_a_purely_position_biased_judge_finds_a_tie():
    always_a = (math.log(0.97), math.log(0.03))
    verdict = Verdict(orders(always_a, always_a))
    assert verdict.winner == "tie"
    assert verdict.probability == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tie_band", "winner"), [(0.0, "a"), (0.1, "a"), (0.15, "a"), (0.2, "tie"), (0.5, "tie")]
)
def test_the_tie_band(tie_band, winner):
    # 0.15625 from the middle, exactly.
    assert Verdict((0.75, 0.5625), tie_band).winner == winner


A, B, TIED = Verdict((0.6, 0.55)), Verdict((0.1, 0.05)), Verdict((0.9, 0.2))


@pytest.mark.parametrize(
    ("verdicts", "winner", "first_advances"),
    [
        ((A, A, B), "a", True),  # the majority, though the mean is 0.41
        ((A, B, B), "b", False),
        ((A, B), "b", False),  # one vote each: the mean, 0.325
        ((B, A), "b", False),
        ((A, TIED), "a", True),  # a tie does not vote
        (
            (B, TIED),
            "b",
            False,
        ),  # the first does not advance: 0.55 and 0.075 are one for each, mean 0.3125
        ((TIED, TIED), "tie", True),
    ],
)
def test_several_principles(verdicts, winner, first_advances):
    result = PairResult(dict(zip("pqr", verdicts, strict=False)))
    assert (result.winner, result.first_advances) == (winner, first_advances)


def test_the_mean_of_several_principles():
    verdicts = Verdict((0.9, 0.5)), Verdict((0.3, 0.1)), Verdict((0.6, 0.9))
    result = PairResult(dict(zip("pqr", verdicts, strict=True)))
    assert result.mean.orders == pytest.approx((0.6, 0.5))
    assert result.probability == pytest.approx(0.55)


def test_tie():
    result = PairResult({"x": Verdict(TIE)})
    assert (result.winner, result.probability, result.mean.consistent) == ("tie", 0.5, True)
