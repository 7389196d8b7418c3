"""Bradley–Terry scores of samples from the probabilities with which they win (Bradley and Terry, 1952)."""

import math
from collections.abc import Mapping

Pair = tuple[int, int]


def scores(num: int, won: Mapping[Pair, float], prior: float = 0.1) -> list[float]:
    """Natural-log strengths s of samples 0 .. num - 1: P(i beats j) = sigmoid(s_i - s_j).

    Penalised maximum likelihood by Hunter's MM iteration (Annals of Statistics 32, 2004): `prior` wins and `prior`
    losses of each sample against one of strength 0 keep scores finite where one wins all, and tie together samples
    that no chain of comparisons links.

    Args:
        num: number of samples
        won: (i, j) -> probability that i beats j; each pair once, any subset of all pairs
        prior: in comparisons
    """
    wins = [prior] * num
    met: list[list[int]] = [[] for _ in range(num)]
    for (i, j), probability in won.items():
        wins[i] += probability
        wins[j] += 1 - probability
        met[i].append(j)
        met[j].append(i)
    strengths = [1.0] * num
    for _ in range(1000):
        before = strengths
        strengths = [
            wins[i]
            / (2 * prior / (before[i] + 1) + sum(1 / (before[i] + before[j]) for j in met[i]))
            for i in range(num)
        ]
        if all(abs(s - b) <= 1e-6 * b for s, b in zip(strengths, before, strict=True)):
            break
    return [math.log(strength) for strength in strengths]
