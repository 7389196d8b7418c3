"""Supervised fine-tuning: `python -m training.sft --model DIR --sft sft.jsonl --output DIR`.

For a base model that also judges, use `training.jsft` instead.
"""

from dataclasses import dataclass

import tyro

from training import supervised
from training.console import main_guard
from training.models import Conversations, load_model, load_tokenizer
from training.supervised import read_answers, train


@dataclass(frozen=True, kw_only=True)
class Options(supervised.Options):
    """Options of supervised fine-tuning."""

    sft: str
    """JSON lines or Parquet of `messages`, or a data set's name; the last assistant turn is learned."""


def main(options: Options) -> None:
    chats = Conversations(load_tokenizer(options.model))
    examples = read_answers(options.sft, chats, options)
    model, tokenizer = load_model(options.model, options.attention)
    train(model, tokenizer, examples, options)


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
