"""Supervised fine-tuning: `python -m training.sft --model DIR --sft sft.jsonl --output DIR`.

For a base model that also judges, use `training.jsft` instead.
"""

from dataclasses import dataclass

import tyro

from training import supervised
from training.console import main_guard
from training.data import read_rows
from training.models import Conversations, load_model
from training.supervised import answer_examples, train


@dataclass(frozen=True, kw_only=True)
class Options(supervised.Options):
    """Options of supervised fine-tuning."""

    sft: str
    """JSON lines or Parquet of `messages`, or a data set's name; the last assistant turn is learned."""


def main(options: Options) -> None:
    rows = read_rows(options.sft, ("messages",))
    model, tokenizer = load_model(options.model, options.attention)
    examples = answer_examples(rows, Conversations(tokenizer), options.prompt_weight)
    train(model, tokenizer, examples, options)


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
