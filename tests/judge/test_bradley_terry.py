"""Bradley–Terry scores against known strengths, and against scipy's optimum."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from judge.bradley_terry import scores


def test_the_strengths_that_made_the_probabilities():
    strengths = [0.0, 1.5, -2.0, 0.3]
    win_probabilities = {
        (i, j): 1 / (1 + math.exp(strengths[j] - strengths[i]))
        for i, j in itertools.combinations(range(4), 2)
    }
    fitted = scores(4, win_probabilities, prior=1e-6)
    assert [score - fitted[0] for score in fitted] == pytest.approx(strengths, abs=1e-3)


def test_the_penalised_optimum_of_an_incomplete_design():
    win_probabilities = {(0, 1): 0.9, (2, 1): 0.4, (3, 4): 1.0, (0, 4): 0.2}
    prior = 0.1

    def loss(strengths):
        against_zero = prior * (np.log(expit(strengths)) + np.log(expit(-strengths)))
        log_likelihoods = [
            p * np.log(expit(strengths[i] - strengths[j]))
            + (1 - p) * np.log(expit(strengths[j] - strengths[i]))
            for (i, j), p in win_probabilities.items()
        ]
        return -(against_zero.sum() + sum(log_likelihoods))

    expected = minimize(loss, np.zeros(5), tol=1e-12).x
    assert scores(5, win_probabilities, prior) == pytest.approx(expected, abs=1e-3)


def test_a_sample_that_wins_everything_has_a_finite_score():
    first, second = scores(2, {(0, 1): 1.0})
    assert math.isfinite(first) and first == pytest.approx(-second, abs=1e-4) and first > 1


def test_nothing_was_compared():
    assert scores(3, {}) == pytest.approx([0.0, 0.0, 0.0])
