"""The probe's fit against scipy, and its cross-validation where the answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from training.probe_fit import RIDGES, cross_validate, fit, group_ids, share_right


def make_pairs(count: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of features, and the weights that make the chosen ones better, up to logistic noise."""
    weight = torch.randn(width)
    differences = torch.randn(count, width) * torch.logspace(-1, 1, width)
    logits = differences @ weight
    logistic = torch.distributions.Uniform(0.0, 1.0).sample((count,)).logit()
    return differences * (logits + noise * logistic).sign()[:, None], weight


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_weights_minimise_the_loss(ridge: float) -> None:
    differences, _ = make_pairs(80, 6, noise=2.0)
    rows = differences.double().numpy()
    scale = np.sqrt((rows**2).mean(0))

    def loss(weights: np.ndarray) -> float:
        return np.logaddexp(0, -(rows / scale) @ weights).mean() + ridge / 2 * (weights**2).sum()

    expected = minimize(loss, np.zeros(6), method="Nelder-Mead", options={
        "xatol": 1e-9, "fatol": 1e-13, "maxiter": 50_000, "maxfev": 50_000,
    }).x / scale  # fmt: skip
    assert fit(differences, ridge).tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_a_feature_that_never_differs_has_no_weight() -> None:
    differences, _ = make_pairs(50, 3, noise=1.0)
    differences[:, 1] = 0
    weight = fit(differences, 0.1)
    assert weight[1] == 0 and weight.isfinite().all()


def test_what_can_be_learned_is_right_on_held_out_pairs() -> None:
    differences, _ = make_pairs(400, 5, noise=0.0)
    result = cross_validate(differences, torch.arange(400), seed=0)
    assert result.accuracy.value > 0.9 and result.loss < 0.5 and result.ridge == min(RIDGES)


def test_noise_is_not_mistaken_for_knowledge() -> None:
    """More features than pairs fit the training pairs entirely.

    A fair coin's share of 200 is 5.5 standard errors away with probability 4e-8.
    """
    differences = torch.randn(200, 300)
    result = cross_validate(differences, torch.arange(200), seed=0)
    assert abs(result.accuracy.value - 0.5) < 5.5 * math.sqrt(0.25 / 200)
    assert result.loss > 0.6


def test_pairs_of_a_prompt_are_held_out_together() -> None:
    """Each pair is there ten times, and its features say nothing about other pairs."""
    differences = torch.randn(40, 60).repeat(10, 1)
    split_apart = cross_validate(differences, torch.arange(400), seed=0)
    kept_together = cross_validate(differences, torch.arange(40).repeat(10), seed=0)
    assert split_apart.accuracy.value == 1.0
    assert kept_together.accuracy.value < 0.9


def test_the_share_of_right_pairs() -> None:
    share, error = share_right(torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.arange(4))
    assert share == 0.625
    assert error == pytest.approx(math.sqrt(0.140625 * 2 + 0.390625 + 0.015625) / 4)
    # The same pairs twice are not more evidence.
    twice = share_right(torch.tensor([2.0, -1.0, 0.0, 3.0] * 2), torch.arange(4).repeat(2))
    assert twice == pytest.approx((share, error))


def test_equal_keys_are_one_group() -> None:
    assert group_ids(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
