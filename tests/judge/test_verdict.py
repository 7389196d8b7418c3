"""Verdict maths, with numbers worked out by hand."""

import math

import pytest

from judge.verdict import TIE, Verdict, combine, label_probability, verdict


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
    found = verdict((math.log(0.8), math.log(0.2)), (math.log(0.6), math.log(0.4)))
    assert found.orders == pytest.approx((0.8, 0.4))
    assert found.probability == pytest.approx(0.6)
    assert not found.consistent
    assert found.winner == "tie"
    assert found.first_goes_on


@pytest.mark.parametrize(
    ("orders", "winner", "consistent", "first_goes_on"),
    [
        ((0.9, 0.6), "a", True, True),
        ((0.4, 0.1), "b", True, False),
        ((0.9, 0.2), "tie", False, True),
        ((0.6, 0.1), "tie", False, False),
        ((0.5, 0.5), "tie", True, True),
        ((0.5, 0.7), "tie", False, True),
    ],
)
def test_winner(orders, winner, consistent, first_goes_on):
    found = Verdict(orders)
    assert (found.winner, found.consistent) == (winner, consistent)
    assert found.first_goes_on is first_goes_on


def test_a_purely_position_biased_judge_finds_a_tie():
    always_a = (math.log(0.97), math.log(0.03))
    found = verdict(always_a, always_a)
    assert found.winner == "tie"
    assert found.probability == pytest.approx(0.5)


def test_combine_takes_the_mean_of_each_order():
    combined = combine([Verdict((0.9, 0.5)), Verdict((0.3, 0.1)), Verdict((0.6, 0.9))])
    assert combined.orders == pytest.approx((0.6, 0.5))


def test_tie():
    assert (TIE.winner, TIE.probability, TIE.consistent) == ("tie", 0.5, True)
