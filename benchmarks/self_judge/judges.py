"""Compares judges: accuracy, consistency, and the choices of each tournament strategy from their verdicts."""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.comparison.answers import EvaluationSet
from benchmarks.comparison.evaluation import DECODING
from benchmarks.comparison.jobs import Setting
from judge.messages import Message
from judge.prompts import Question
from judge.tournament import Pair, TournamentRecord, play
from judge.verdict import TIE, PairResult, Verdict
from proxy.checkpoint import identify
from training.models import load_model
from training.pair_judges import judge_pairs, load_judges
from training.rewards import Frozen
from training.toy_data import principles, reference_scorer

CLEAR = 2.0
"""Pairs differ clearly if their reference scores differ by at least this much."""
BATCH = 64

JudgePairs = Callable[[Sequence[Question]], list[PairResult]]
Rate = tuple[float, float]
"""A share and its standard error."""


class JudgeSource(NamedTuple):
    """A judge of a training seed."""

    job: str | None
    """The job that trains it; None = the frozen LLM's own judgment."""
    principles: tuple[str, ...] = ()
    """The principles it judges by; () = the first."""


JUDGES = {
    "self-judge, as bundled": JudgeSource(None),
    "self-judge, LoRA": JudgeSource("reward-judge"),
    "likelihood ratio, LoRA": JudgeSource("reward-likelihood"),
    "likelihood ratio, LoRA, more data": JudgeSource("reward-more"),
    "implicit reward": JudgeSource("reward-implicit"),
    "scalar reward": JudgeSource("reward-scalar"),
}
MAJORITY = JudgeSource("reward-judge", tuple(principles.PRINCIPLES))
"""All principles at once; the cost is proportional to their number."""


def load_judge(
    setting: Setting, evaluation: EvaluationSet, by: JudgeSource, seed: int
) -> JudgePairs:
    # A model of its own: a judge that is a LoRA stays loaded on it.
    model = load_model(str(setting.model), dtype=torch.bfloat16)[0].eval()
    base = identify(str(setting.model))
    frozen = Frozen(model, evaluation.tokenizer, base, DECODING, evaluation.end_ids, BATCH)
    place = str(setting.directory(f"{by.job}/{seed}")) if by.job else None
    return partial(judge_pairs, load_judges(place, frozen, by.principles))


def agreement(
    judge: JudgePairs, rows: Sequence[dict[str, Any]], quality: str | None = None
) -> dict[str, Any]:
    """Agreement of the judge with the reference scorer, with the labels and with itself, on all and on clear pairs.

    Args:
        rows: labelled pairs
        quality: which one the reference scorer grades; None = all
    """
    pair_results = judge([_question(row) for row in rows])
    prefers = torch.tensor([pair_result.first_advances for pair_result in pair_results])
    consistent = torch.tensor([pair_result.mean.consistent for pair_result in pair_results])
    golds = torch.tensor([preferred(row, quality) for row in rows])
    right, clear = prefers == (golds > 0), golds.abs() >= CLEAR
    return {
        "gold": rate(right),
        "labels": rate(prefers),
        "gold_clear": rate(right[clear]),
        "consistency": rate(consistent),
        "consistency_clear": rate(consistent[clear]),
        "pairs": len(rows),
        "clear": int(clear.sum()),
    }


def rate(hits: Tensor) -> Rate:
    p = hits.float().mean().item()
    return p, math.sqrt(p * (1 - p) / max(1, len(hits)))


def preferred(row: dict[str, Any], quality: str | None = None) -> float:
    """Reference score of the chosen response minus that of the rejected one; by a single quality if it is named."""
    text = row["prompt"][-1]["content"]

    def score(answer: str) -> float:
        if quality is None:
            return reference_scorer.score(text, answer)
        return -reference_scorer.WEIGHTS[quality] * (
            quality in reference_scorer.flaws(text, answer)
        )

    chosen, rejected = (score(row[side][-1]["content"]) for side in ("chosen", "rejected"))
    return chosen - rejected


def _question(row: dict[str, Any]) -> Question:
    return Question(row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"])


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def knock_out_round(
    judge: JudgePairs, prompts: Sequence[str], standing: list[list[str]]
) -> list[list[str]]:
    """Compare neighbouring answers for every prompt at once; each prompt has an even number of them."""
    questions = [
        Question([_user(prompt)], a, b)
        for prompt, row in zip(prompts, standing, strict=True)
        for a, b in zip(row[::2], row[1::2], strict=True)
    ]
    pair_results = iter(judge(questions))
    return [
        [
            a if next(pair_results).first_advances else b
            for a, b in zip(row[::2], row[1::2], strict=True)
        ]
        for row in standing
    ]


PairResults = dict[Pair, PairResult]


def all_results(judge: JudgePairs, prompt: str, answers: Sequence[str]) -> PairResults:
    """The results of every pair in both orders. Identical answers tie, as in the server."""
    pairs = [(a, b) for a in range(len(answers)) for b in range(a)]
    ruled = judge([Question([_user(prompt)], answers[a], answers[b]) for a, b in pairs])
    results: PairResults = {}
    for (a, b), pair_result in zip(pairs, ruled, strict=True):
        first, second = TIE if answers[a] == answers[b] else pair_result.mean.orders
        results[a, b] = PairResult({"judge": Verdict((first, second))})
        results[b, a] = PairResult({"judge": Verdict((1 - second, 1 - first))})
    return results


def play_known(strategy: str, num: int, seed: int, pair_results: PairResults) -> TournamentRecord:
    """A strategy's tournament, from known results."""

    async def look_up(pairs: list[Pair], tokens: int | None) -> list[PairResult]:
        return [pair_results[pair] for pair in pairs]

    return asyncio.run(play(strategy, num, look_up, seed))
