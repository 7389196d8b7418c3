"""Win rates and flaw rates of answers to toy prompts, by the reference scorer."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from training.toy_data import reference_scorer


def win_rate(
    prompts: Sequence[str], answers: Sequence[str], baseline: Sequence[str]
) -> tuple[float, float]:
    """Share of prompts whose answer scores higher than the baseline's, and its standard error. Ties count half.

    Raises:
        KeyError: a prompt is not one of the toy data's.
    """
    wins = []
    for prompt, answer, other in zip(prompts, answers, baseline, strict=True):
        difference = reference_scorer.score(prompt, answer) - reference_scorer.score(prompt, other)
        wins.append(0.5 + 0.5 * math.copysign(1, difference) if difference else 0.5)
    return fmean(wins), stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else math.nan


def flaw_rates(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Share of answers that fail in each quality, and in `any`."""
    counts: Counter[str] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        flaws = reference_scorer.flaws(prompt, answer)
        counts.update(flaws)
        counts["any"] += bool(flaws)
    qualities = (*reference_scorer.WEIGHTS, "any")
    return {quality: counts[quality] / len(answers) for quality in qualities}
