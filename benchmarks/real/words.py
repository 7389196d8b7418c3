"""A second opinion that no LLM has a part in: a linear model on which words an answer has, fitted to part B."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.jobs import Job
from benchmarks.real.setting import Setting
from benchmarks.real.texts import words_of
from training.data import PAIR, read_rows
from training.probe_fit import cross_validate, fit, group_ids, share_right

SECOND_WORDS = "second-words"
_RARE = 1 / 80
"""A word that fewer of the answers have has no weight: it would learn single answers by heart."""

Weights = dict[str, float]


def make_second_words() -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        rows, test = (read_rows(setting.data(f"pairs_{name}"), PAIR) for name in ("b", "test"))
        counts = Counter(
            word for row in rows for kind in ("chosen", "rejected") for word in _words(row, kind)
        )
        fewest = max(2, int(_RARE * 2 * len(rows)))
        known = [word for word, count in counts.items() if count >= fewest]
        differences = _differences(rows, known)
        weight = fit(differences, cross_validate(differences, _prompts(rows), seed=0).ridge)
        right = share_right(_differences(test, known) @ weight, _prompts(test))
        return {
            "weights": dict(zip(known, weight.tolist(), strict=True)),
            "right": {"share": right.value, "se": right.error, "pairs": len(test)},
        }

    return Job(SECOND_WORDS, run, ("data",))


def score(weights: Weights, text: str) -> float:
    """The sum of the weights of an answer's words."""
    found = {*words_of(text)}
    return sum(weight for word, weight in weights.items() if word in found)


def _words(row: dict[str, Any], kind: str) -> set[str]:
    return {*words_of(row[kind][-1]["content"])}


def _differences(rows: list[dict[str, Any]], known: list[str]) -> Tensor:
    """Which known words the better answer has, less those of the worse one: [N, W]."""
    found = [
        [(word in better) - (word in worse) for word in known]
        for row in rows
        for better, worse in [(_words(row, "chosen"), _words(row, "rejected"))]
    ]
    return torch.tensor(found, dtype=torch.float64)


def _prompts(rows: list[dict[str, Any]]) -> Tensor:
    return group_ids([repr(row["prompt"]) for row in rows])
