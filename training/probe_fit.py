"""Fits a probe's weights to preference pairs, and says by cross-validation what they are worth.

The Bradley–Terry loss of N pairs with features f, plus ridge:

    L(v) = 1/N Σ_i −log σ(v · d_i) + λ/2 |v|²,    d_i = (f⁺_i − f⁻_i) / s

with s the root mean square of each difference f⁺ − f⁻. It is convex. The probe's weights are w = v / s, so the
probability that one response beats another is σ(r − r').
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.preferences import Preferences

RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
FOLDS = 5
_ITERATIONS = 200


class Share(NamedTuple):
    """A share of pairs and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


class Validated(NamedTuple):
    """A setting, with its figures on pairs that were held out."""

    ridge: float
    loss: float  # Bradley–Terry's, in nats a pair
    accuracy: Share


def fit(differences: Tensor, ridge: float, start: Tensor | None = None) -> Tensor:
    """w that minimises L, [H] float64.

    Args:
        differences: f⁺ − f⁻, [N, H].
        ridge: λ.
        start: w to begin from, for speed.
    """
    differences = differences.double()
    scale = differences.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    rows = differences / scale
    v = (torch.zeros_like(scale) if start is None else start * scale).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [v], max_iter=_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.softplus(-(rows @ v)).mean() + ridge / 2 * v.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return v.detach() / scale


def cross_validate(differences: Tensor, groups: Tensor, seed: int) -> Validated:
    """The ridge with the lowest loss on held-out pairs, in `FOLDS` folds.

    Args:
        differences: f⁺ − f⁻, [N, H].
        groups: [N] int; pairs of one group, those with the same prompt, are held out together.
        seed: of the folds.
    """
    num_groups = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    folds = (torch.randperm(num_groups, generator=generator) % FOLDS)[groups]
    margins = torch.zeros(len(RIDGES), len(differences), dtype=torch.float64)
    for fold in range(FOLDS):
        aside, weight = folds == fold, None
        for i, ridge in enumerate(RIDGES):
            weight = fit(differences[~aside], ridge, weight)
            margins[i, aside] = differences[aside].double() @ weight
    losses = F.softplus(-margins).mean(-1)
    best = int(losses.argmin())
    return Validated(RIDGES[best], losses[best].item(), share_right(margins[best], groups))


def share_right(margins: Tensor, groups: Tensor) -> Share:
    """Share of positive margins [N], 0 counting half; its error allows for pairs of one group [N] being alike."""
    right = (margins.sign() + 1) / 2
    value = right.double().mean()
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, groups, right.double() - value)
    return Share(value.item(), sums.square().sum().sqrt().item() / len(margins))


def differences_of(values: Tensor, pairs: Preferences) -> Tensor:
    """The better response's value less the worse one's: [N responses, ...] -> [N pairs, ...]."""
    better, worse = torch.tensor(pairs.pairs).unbind(-1)
    return values[better] - values[worse]


def prompts_of(pairs: Preferences) -> Tensor:
    """The number of each pair's prompt: [N]."""
    return group_ids([tuple(pairs.responses[better].prompt) for better, _ in pairs.pairs])


def group_ids(keys: Sequence[Hashable]) -> Tensor:
    """Equal keys get the same number from 0 on: [N]."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
