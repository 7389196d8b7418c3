"""How lm-eval scores an answer in `toy_flaws.yaml`."""

from training.toy_data import reference_scorer


def score(document: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Whether the answer has no flaw, and its number of words."""
    (answer,) = answers
    flaws = reference_scorer.flaws(document["prompt"], answer)
    return {"flawless": float(not flaws), "words": float(len(answer.split()))}
