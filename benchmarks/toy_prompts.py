"""Held-out prompts of the toy data, and a mean with its standard error."""

import math
import random
from collections.abc import Sequence
from itertools import islice
from statistics import fmean, stdev

from training.toy_data.files import draw_prompts, split_combinations

DATA_SEED = 0  # of the demo's data, by which the held-out combinations are known


def held_out_prompts(count: int, seed: int) -> list[str]:
    """Texts of `count` prompts of the world's test split."""
    _, _, test = split_combinations(DATA_SEED)
    return [prompt.text for prompt in islice(draw_prompts(test, random.Random(seed)), count)]


def mean(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))
