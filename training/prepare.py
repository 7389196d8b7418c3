"""Check preference pairs and set some of them aside.

    python -m training.prepare --model runs/base --preferences my_preferences.jsonl --output runs/data

Reads every pair as the training commands do, prints statistics and what was skipped, and writes two files of rows in
TRL's format: `train.jsonl`, and `held_out.jsonl`, whose prompts occur in no pair of the former, not even with different
white space.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pydantic import NonNegativeInt

from judge.messages import prompt_key, text_of
from judge.options import Seed
from proxy.checkpoint import resolve_model_dir
from training import output
from training.console import TrainingError, main_guard, read_options
from training.conversations import Conversations
from training.data import ABOUT_A_PAIR, PAIR, Row, RowOptions, read_as
from training.models import load_tokenizer
from training.output import Run


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What to check."""

    model: str
    """The LLM to be aligned, a directory or a hub id: its tokenizer counts the tokens."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name. Other layouts of
    `judge.layouts` are accepted too.
    """
    output: Path
    """Directory for `train.jsonl` and `held_out.jsonl`."""
    held_out: NonNegativeInt = 200
    """Minimum number of pairs to set aside: all pairs of a prompt go together."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of the choice of prompts to set aside."""


class Pair(NamedTuple):
    """A preference pair and its lengths."""

    row: Row
    prompt: str  # key of the conversation before the answer, from `prompt_key`
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int


def main(options: Options) -> None:
    reads, writes = ("model", "preferences"), ("train.jsonl", "held_out.jsonl")
    with output.run(options, "training.prepare", reads=reads, writes=writes) as run:
        _prepare(options, run)


def _prepare(options: Options, run: Run) -> None:
    chats = Conversations(load_tokenizer(str(resolve_model_dir(options.model))))
    pairs = read_as(options.preferences, PAIR, options, lambda row: _measure(row, chats))
    train, held_out = split(pairs, options.held_out, options.seed)
    print(f"{len(pairs)} pairs")
    print("\n".join(describe(pairs)))
    print(f"A prompt as the LLM reads it: {_as_read(pairs[0], chats)!r}")
    run.start()
    for name, part in (("train", train), ("held_out", held_out)):
        path = options.output / f"{name}.jsonl"
        lines = [json.dumps(pair.row) for pair in part]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {len(part)} pairs")


def split(pairs: list[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The training pairs, and at least `held_out` pairs with other prompts, both in their original order.

    Raises:
        TrainingError: fewer than half would be left to train on.
    """
    sizes = Counter(pair.prompt for pair in pairs)
    prompts = sorted(sizes)
    random.Random(seed).shuffle(prompts)
    aside: set[str] = set()
    count = 0
    while count < held_out and prompts:
        prompt = prompts.pop()
        aside.add(prompt)
        count += sizes[prompt]
    if count > len(pairs) / 2:
        raise TrainingError(
            f"{count} of {len(pairs)} pairs would be held out, more than half: lower --held-out {held_out}"
        )
    train = [pair for pair in pairs if pair.prompt not in aside]
    return train, [pair for pair in pairs if pair.prompt in aside]


def describe(pairs: list[Pair]) -> list[str]:
    """Statistics to check before training."""
    distinct = {(pair.prompt, *_answers(pair.row)) for pair in pairs}
    contradicted = (
        sum((prompt, worse, better) in distinct for prompt, better, worse in distinct) // 2
    )
    longer = sum(pair.chosen_tokens > pair.rejected_tokens for pair in pairs) / len(pairs)
    answers = [n for pair in pairs for n in (pair.chosen_tokens, pair.rejected_tokens)]
    return [
        f"{len({pair.prompt for pair in pairs})} different prompts",
        f"{len(pairs) - len(distinct)} pairs repeat another, {contradicted} are contradicted by another",
        f"prompts: {_lengths([pair.prompt_tokens for pair in pairs])}",
        f"answers: {_lengths(answers)}",
        f"the chosen answer is the longer one in {longer:.0%} of the pairs",
    ]


def _measure(row: Row, chats: Conversations) -> Pair:
    prompt, better = chats.split_ids(row["prompt"], row["chosen"][0])
    _, worse = chats.split_ids(row["prompt"], row["rejected"][0])
    kept = {field: row[field] for field in (*PAIR, *ABOUT_A_PAIR) if field in row}
    return Pair(kept, prompt_key(row["prompt"]), len(prompt), len(better), len(worse))


def _answers(row: Row) -> tuple[str, str]:
    return text_of(row["chosen"][0]), text_of(row["rejected"][0])


def _lengths(counts: list[int]) -> str:
    return f"{median(counts):.0f} tokens in the median, {max(counts)} at most"


def _as_read(pair: Pair, chats: Conversations) -> str:
    return chats.tokenizer.decode(chats.prompt_ids(pair.row["prompt"]))


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
