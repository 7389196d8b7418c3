"""Judge-augmented supervised fine-tuning (JSFT, arXiv 2402.11253): one model learns to answer and to judge.

    python -m training.jsft --model DIR --sft sft.jsonl --preferences preferences.jsonl --output DIR

The data is the SFT data and, from every preference pair, two judgments, one in either order, whose answer is a single
token. In the paper a verdict counts as much as any token; here `judge_weight` says what it counts for, because one
token in fifty teaches a small model slowly.
"""

from dataclasses import dataclass

import tyro

from training import supervised
from training.console import main_guard
from training.data import PAIR, read_rows
from training.supervised import Conversations, answer_examples, judgment_examples, load_model, train


@dataclass(frozen=True, kw_only=True)
class Options(supervised.Options):
    """Options of judge-augmented supervised fine-tuning."""

    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name."""
    judge_weight: float = 8.0
    """Loss weight of a verdict, in answer tokens."""


def main(options: Options) -> None:
    sft = read_rows(options.sft, ("messages",))
    pairs = read_rows(options.preferences, PAIR)
    model, tokenizer = load_model(options.model, options.attention)
    answers = answer_examples(sft, Conversations(tokenizer), options.prompt_weight)
    judgments = judgment_examples(pairs, tokenizer, options.judge_weight, options.prompt_weight)
    print(f"{len(answers)} answers and {len(judgments)} judgments")
    train(model, tokenizer, answers + judgments, options)


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
