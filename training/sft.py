"""Supervised fine-tuning: `python -m training.sft --model DIR --sft sft.jsonl --output DIR`.

For a base model that also judges, use `training.jsft` instead.
"""

import tyro

from training.console import main_guard
from training.data import read_rows
from training.supervised import Conversations, Options, answer_examples, load_model, train

__all__ = ["Options", "main"]


def main(options: Options) -> None:
    rows = read_rows(options.sft, ("messages",))
    model, tokenizer = load_model(options.model, options.attention)
    examples = answer_examples(rows, Conversations(tokenizer), options.prompt_weight)
    train(model, tokenizer, examples, options)


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
