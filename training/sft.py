"""Supervised fine-tuning: `python -m training.sft --model DIR --sft sft.jsonl --output DIR`.

For a base model that also judges, use `training.jsft` instead.
"""

from dataclasses import dataclass

from training import output, supervised
from training.checkpoints import WRITES
from training.console import main_guard, read_options
from training.conversations import Conversations
from training.models import load_tokenizer
from training.output import Run
from training.publish import publish
from training.run_card import write_card
from training.supervised import read_answers, train


@dataclass(frozen=True, kw_only=True)
class Options(supervised.Options):
    """Options of supervised fine-tuning."""

    sft: str
    """JSON lines or Parquet of `messages`, or a data set's name; the last assistant turn is learned."""


def main(options: Options) -> None:
    with output.run(options, "training.sft", reads=("model", "sft"), writes=WRITES) as run:
        if not run.is_finished:
            _train(options, run)
            write_card(run, options)
    publish(run, options)


def _train(options: Options, run: Run) -> None:
    tokenizer = load_tokenizer(options.model)
    train(tokenizer, read_answers(options.sft, Conversations(tokenizer), options), options, run)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
