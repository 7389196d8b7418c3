"""The toy data's reference scorer as a grader: `judge.plan --grader benchmarks.gold:scores`. It is never a reward."""

from collections.abc import Sequence

from training.toy_data import reference_scorer


def scores(prompts: Sequence[Sequence[dict[str, str]]], completions: Sequence[str]) -> list[float]:
    """Scores of answers to single-turn prompts of the toy data."""
    return [
        reference_scorer.score(prompt[-1]["content"], completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
