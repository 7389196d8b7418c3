"""Reads rows for all commands: fields in TRL's conversational formats, or the reason why a row cannot be used.

{"messages": [...]}                                   for supervised fine-tuning
{"prompt": [...], "chosen": [...], "rejected": [...]} preferences
{"prompt": [...], "completion": [...], "label": true} single verdicts: good or bad
{"prompt": [...]}                                     prompts

`judge.sources` defines sources, `judge.layouts` the layouts. The rules:

- A prompt does not end with the assistant's turn, and an answer is one assistant message: pairs whose answers are
  several turns cannot be used. A learned or preferred answer is not empty; a rejected or bad one may be.
- Rows that cannot be used are skipped and reported by reason with an example. If their share is too large, the file is
  of another kind: an error.
- Pairs that prefer nothing (both answers, or their scores, are the same) are left out and counted, at any share.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from judge.layouts import PAIR, VERDICT, Row, conversational
from judge.messages import Message, Unusable, check_text, text_of
from judge.options import Share
from judge.sources import SourceError, parse, raw_rows

RATIONALE = ("rationale_chosen", "rationale_rejected")
ABOUT_A_PAIR = ("principle", *RATIONALE)
"""Optional fields of a pair, all texts."""

_Item = TypeVar("_Item")
_EXCERPT_LENGTH = 100  # characters


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How to read rows."""

    max_skipped: Share = 0.1
    """Limit of the share of unusable rows, which are skipped and counted; a larger share is an error."""
    strict: bool = False
    """Skip no row: the first unusable one is an error."""


class PrefersNothing(ValueError):
    """Both sides of the pair are the same."""


def read_rows(
    source: str,
    fields: tuple[str, ...],
    options: RowOptions,
    use: Callable[[Row], _Item],
    limit: int | None = None,
) -> Iterator[tuple[str, _Item]]:
    """The place of each usable row, and the result of `use` on it. Prints what was skipped.

    Args:
        fields: each becomes a list of messages; () = those that the row has
        use: raises ValueError for a row that the caller cannot use
        limit: number of rows to read

    Raises:
        SourceError: the source is missing, broken or empty, or too many of its rows cannot be used.
    """
    tally, kept = _Tally(source, options), 0
    for where, raw in raw_rows(source):
        if kept == limit:
            break
        try:
            row = parse(raw)
            row_fields = fields or _fields_of(row)
            readings = list(conversational(row, row_fields))
        except Unusable as error:
            tally.skip(where, raw, error)
            continue
        for reading in readings:
            try:
                item = use(check_row(reading, row_fields))
            except PrefersNothing:
                tally.equals += 1
            except ValueError as error:
                tally.skip(where, raw, error)
            else:
                kept += 1
                yield where, item
    tally.finish(kept)


def _fields_of(row: Row) -> tuple[str, ...]:
    if row.get("messages") is not None:
        return ("messages",)
    if row.get("completion") is not None and row.get("label") is not None:
        return VERDICT
    return PAIR if row.get("chosen") is not None else ("prompt",)


def check_row(row: Row, fields: tuple[str, ...] = PAIR) -> Row:
    """The row, whose `fields` are lists of messages, without nulls.

    Raises:
        Unusable: it breaks a rule above.
        PrefersNothing: both sides of the pair are the same.
    """
    if "prompt" in fields:
        _check_prompt(row["prompt"])
    if "messages" in fields:
        _check_answer("messages", row["messages"][-1])
    if "chosen" in fields:
        _check_pair(row)
    if "completion" in fields:
        _check_verdict(row)
    return {key: value for key, value in row.items() if value is not None}


def _check_prompt(prompt: list[Message]) -> None:
    if not prompt:
        raise Unusable("there is no prompt: the dialogues differ from their first turn on")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's turn: nothing is to be answered")
    if prompt[-1]["role"] != "tool" and not prompt[-1]["content"].strip():
        raise Unusable("the prompt is empty")


def _check_pair(row: Row) -> None:
    answers = row["chosen"], row["rejected"]
    if any(len(answer) > 1 for answer in answers):
        raise Unusable(
            "an answer of several turns", "chosen and rejected differ before their last turn"
        )
    (chosen,), (rejected,) = answers
    if text_of(chosen) == text_of(rejected):
        raise PrefersNothing
    _check_answer("chosen", chosen)
    _check_role("rejected", rejected)
    about = {name: row[name] for name in ABOUT_A_PAIR if row.get(name) is not None}
    if not all(isinstance(text, str) for text in about.values()):
        raise Unusable(f"{' and '.join(about)} must be texts")
    if (RATIONALE[0] in about) != (RATIONALE[1] in about):
        raise Unusable(f"a rationale is two texts: {' and '.join(RATIONALE)}")
    check_text(about)


def _check_verdict(row: Row) -> None:
    if not isinstance(row.get("label"), bool):
        raise Unusable("the label of a completion is not true or false")
    if len(row["completion"]) != 1:
        raise Unusable("the completion is not a single turn")
    check = _check_answer if row["label"] else _check_role
    check("completion", row["completion"][-1])


def _check_answer(field: str, message: Message) -> None:
    _check_role(field, message)
    if not text_of(message).strip():
        raise Unusable(
            "the answer is empty" if field == "messages" else f"the {field} answer is empty"
        )


def _check_role(field: str, message: Message) -> None:
    if message["role"] != "assistant":
        raise Unusable(f"{field} ends with {message['role']!r}, not an assistant")


class _Skipped(NamedTuple):
    rows: int
    example: str
    excerpt: str


class _Tally:
    """Counts the rows of a source that are left out."""

    def __init__(self, source: str, options: RowOptions) -> None:
        self.source, self.options = source, options
        self.equals = 0
        self.skipped: dict[str, _Skipped] = {}

    def skip(self, where: str, raw: Any, error: ValueError) -> None:
        example = f"{where}: {' '.join(str(error).split())}"
        if self.options.strict:
            raise SourceError(example)
        reason = error.reason if isinstance(error, Unusable) else str(error)
        before = self.skipped.get(reason, _Skipped(0, example, _excerpt(raw)))
        self.skipped[reason] = before._replace(rows=before.rows + 1)

    def finish(self, kept: int) -> None:
        total = sum(group.rows for group in self.skipped.values())
        rows = kept + self.equals + total
        if not rows:
            raise SourceError(f"{self.source}: there are no rows")
        reasons = sorted(self.skipped.values(), reverse=True, key=lambda group: group.rows)
        if total > self.options.max_skipped * rows or total == rows:
            raise SourceError(
                f"{reasons[0].example}; {total} of {rows} rows cannot be used, and --max-skipped allows a share of "
                f"{self.options.max_skipped:g}: is it a file of another kind?"
            )
        if total:
            print(f"{self.source}: skipped {total} of {rows} rows that cannot be used:")
        for group in reasons:
            example = group.example.removeprefix(f"{self.source}, ")
            print(f"  {group.rows} like {example}: {group.excerpt}")
        if self.equals:
            print(
                f"{self.source}: left out {self.equals} of {rows} rows that prefer nothing: both answers are the "
                "same, or their scores"
            )
        if not kept:
            raise SourceError(
                f"{self.source}: no row prefers anything: both answers are the same in every pair"
            )


def _excerpt(raw: Any) -> str:
    text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
    text = text.strip().encode(errors="replace").decode()
    return text if len(text) <= _EXCERPT_LENGTH else f"{text[:_EXCERPT_LENGTH]} ..."
