"""Bradley–Terry scores against strengths that are known, and against scipy's optimum."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from judge.bradley_terry import scores


def test_the_strengths_that_made_the_probabilities():
    true = [0.0, 1.5, -2.0, 0.3]
    won = {
        (i, j): 1 / (1 + math.exp(true[j] - true[i]))
        for i, j in itertools.combinations(range(4), 2)
    }
    found = scores(4, won, prior=1e-6)
    assert [s - found[0] for s in found] == pytest.approx(true, abs=1e-3)


def test_the_penalised_optimum_of_an_incomplete_design():
    won = {(0, 1): 0.9, (2, 1): 0.4, (3, 4): 1.0, (0, 4): 0.2}
    prior = 0.1

    def loss(s):
        against_zero = prior * (np.log(expit(s)) + np.log(expit(-s)))
        games = [
            p * np.log(expit(s[i] - s[j])) + (1 - p) * np.log(expit(s[j] - s[i]))
            for (i, j), p in won.items()
        ]
        return -(against_zero.sum() + sum(games))

    expected = minimize(loss, np.zeros(5), tol=1e-12).x
    assert scores(5, won, prior) == pytest.approx(expected, abs=1e-3)


def test_a_sample_that_wins_everything_has_a_finite_score():
    first, second = scores(2, {(0, 1): 1.0})
    assert math.isfinite(first) and first == pytest.approx(-second, abs=1e-4) and first > 1


def test_nothing_was_compared():
    assert scores(3, {}) == pytest.approx([0.0, 0.0, 0.0])
