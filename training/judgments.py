"""Judgment examples: what `training.jsft` trains on, from preference pairs."""

from collections.abc import Iterator, Mapping
from typing import Any

from judge.messages import text_of
from judge.pairwise import encode_question
from judge.principles import Principle
from judge.prompts import Question, TooLong, label_ids, rationale_ids, rationale_text
from training.console import TrainingError
from training.data import PAIR, RATIONALE, Row, RowOptions, read_as
from training.supervised import Example


def read_pairs(source: str, principles: Mapping[str, Principle], options: RowOptions) -> list[Row]:
    """Pairs, each with a known `principle` or without one.

    Raises:
        TrainingError: as `training.data.read_as`.
    """

    def known(row: Row) -> Row:
        name = row.get("principle")
        if name is not None and name not in principles:
            raise ValueError(
                f"unknown principle {name!r}; known are {', '.join(principles)}: name a file that has it with "
                "--principles"
            )
        return row

    return read_as(source, PAIR, options, known)


def judgment_examples(
    rows: list[Row],
    tokenizer: Any,
    principles: Mapping[str, Principle],
    *,
    label_weight: float,
    prompt_weight: float = 0.0,
    max_tokens: int,
) -> Iterator[Example]:
    """Each pair as two judgments, one in each order. The target is the label and, if the row has one, the rationale.

    Args:
        rows: pairs of `read_pairs`; one without a `principle` uses the first
        label_weight: loss weight of a label, in tokens of a rationale
        prompt_weight: loss weight of the judge prompt's tokens
        max_tokens: of an example; longer questions are shortened by `judge.prompts.shorten`

    Raises:
        TrainingError: a rationale leaves no room for the question.
        JudgePromptError: the tokenizer cannot encode a judgment.
    """
    labels = {name: label_ids(tokenizer, principle) for name, principle in principles.items()}
    for row in rows:
        name = row.get("principle") or next(iter(principles))
        principle, chosen, rejected = principles[name], row["chosen"][0], row["rejected"][0]
        question = Question(row["prompt"], text_of(chosen), text_of(rejected))
        rests = _rationales(row, tokenizer, principle)
        try:
            room = max_tokens - 1 - max(map(len, rests))
            judgment = encode_question(tokenizer, question, principle, room)
        except TooLong:
            raise TrainingError(
                f"a judgment by {name!r} has no room for its question in {max_tokens} tokens, --max-length or the "
                f"model's context: the principle, and a rationale of {max(map(len, rests))} tokens, fill them"
            ) from None
        for label, context, rest in zip(labels[name], judgment.prompts, rests, strict=True):
            weights = [prompt_weight] * len(context) + [label_weight] + [1.0] * len(rest)
            yield Example([*context, label, *rest], weights)


def _rationales(row: Row, tokenizer: Any, principle: Principle) -> list[list[int]]:
    """The tokens after the label, with the chosen response first and with it last; empty without a rationale."""
    if row.get(RATIONALE[0]) is None:
        return [[], []]
    chosen, rejected = (row[field] for field in RATIONALE)
    return [
        rationale_ids(tokenizer, principle, label, rationale_text(*shown))
        for label, shown in enumerate(((chosen, rejected), (rejected, chosen)))
    ]
