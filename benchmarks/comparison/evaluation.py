"""Evaluation sets of the comparisons, and the figures of a method's answers to them."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.answers import (
    Answers,
    EvaluationSet,
    answer,
    by_policy,
    divergence,
    grade,
)
from benchmarks.comparison.jobs import Setting
from training.conversations import Conversations
from training.data import read_rows
from training.models import end_ids, load_model
from training.policy import Decoding, Policy

DECODING = Decoding()


DATA_SEED = 0  # the frozen LLM was made with it, and has not seen its held-out prompts


NOISE = (
    *("frozen", "frozen, again", "top-p 0.8", "top-p 0.6", "greedy"),
    *("tuned", "proxy", "threshold", "best of", "proxy best of", "decodings"),
)


def open_evaluation_set(setting: Setting, split: str) -> EvaluationSet:
    model, tokenizer = load_model(str(setting.model), dtype=torch.bfloat16)
    model.eval()
    rows = read_rows(setting.data(f"prompts_{split}"), ("prompt",))[: setting.num_test]
    chats = Conversations(tokenizer)
    return EvaluationSet(
        model,
        tokenizer,
        end_ids(model, tokenizer),
        [row["prompt"][-1]["content"] for row in rows],
        [chats.prompt_ids(row["prompt"]) for row in rows],
    )


def frozen_texts(setting: Setting, split: str, seed: int) -> list[str]:
    return json.loads((setting.directory(f"frozen/{seed}") / f"{split}.json").read_text())


def graded(
    setting: Setting,
    evaluation: EvaluationSet,
    answers: Answers,
    seed: int,
    policy: Policy,
    decoding: Decoding = DECODING,
    split: str = "test",
) -> dict[str, Any]:
    """The metrics of a row of the table."""
    figures = grade(evaluation, answers, frozen_texts(setting, split, seed))
    measured = answers.responses[: setting.num_divergence]
    kl, error = divergence(evaluation, measured, policy, decoding)
    return figures | {"kl": kl, "kl_se": error, "kl_prompts": len(measured)}


def noise(row: str, seed: int) -> int:
    """A seed for the answers of a row that no other row has."""
    return 1000 * (1 + NOISE.index(row)) + seed


def tuned(setting: Setting, directory: Path, seed: int, split: str) -> dict[str, Any]:
    """Metrics of a fine-tuned model that was trained into the directory."""
    evaluation = open_evaluation_set(setting, split)
    policy = Policy(load_model(str(directory), dtype=torch.bfloat16)[0].eval())
    answers = answer(evaluation, noise("tuned", seed), by_policy(evaluation, policy, DECODING))
    return graded(setting, evaluation, answers, seed, policy, split=split)
