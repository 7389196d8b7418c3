"""Read rows in TRL's conversational formats; a bad row is named by file and line.

{"messages": [...]}                                   for supervised fine-tuning
{"prompt": [...], "chosen": [...], "rejected": [...]} preferences
{"prompt": [...]}                                     prompts

A source is a file of JSON lines, a Parquet file, or a data set's name for `datasets.load_dataset`, with a split after a
colon: `HuggingFaceH4/ultrafeedback_binarized:train_prefs`. `training.layouts` says which other layouts are understood.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.console import TrainingError
from training.layouts import Message, Row, conversational

__all__ = ["PAIR", "ROLES", "Message", "Row", "read_rows"]

ROLES = ("system", "user", "assistant")
PAIR = ("prompt", "chosen", "rejected")
"""Fields of a preference pair."""


def read_rows(
    source: str | Path, fields: tuple[str, ...] = (), check: Callable[[Row], None] | None = None
) -> list[Row]:
    """The rows of a source, each checked: it has `fields`, each a list of chat messages.

    Args:
        check: what else a row must be, or ValueError.

    Raises:
        TrainingError: no such source, no rows, or a bad row, named by file and line.
    """
    rows, without = [], 0
    for where, raw in _raw_rows(str(source)):
        try:
            row = conversational(raw)
        except ValueError as error:
            raise TrainingError(f"{where}: {error}") from None
        if row is None:
            without += 1
            continue
        _check(row, fields, where)
        if check is not None:
            try:
                check(row)
            except ValueError as error:
                raise TrainingError(f"{where}: {error}") from None
        rows.append(row)
    if without:
        print(f"{source}: left out {without} rows that prefer nothing")
    if not rows:
        raise TrainingError(f"{source}: there are no rows")
    return rows


def _raw_rows(source: str) -> Iterator[tuple[str, Row]]:
    """Each row, and where it stands."""
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        yield from _numbered(source, _load_dataset(source, "parquet", data_files=source))
    elif path.is_file():
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{source}, line {number}"
                    yield where, _parse(line, where)
    elif path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute():
        raise TrainingError(f"{source}: no such file")
    else:
        name, _, split = source.partition(":")
        yield from _numbered(source, _load_dataset(source, name, split=split or "train"))


def _numbered(source: str, rows: Any) -> Iterator[tuple[str, Row]]:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _load_dataset(source: str, name: str, split: str = "train", **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split, **options)
    except Exception as error:  # each loader has its own
        raise TrainingError(
            f"{source}: neither a file nor a data set that can be had ({error})"
        ) from None


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _check(row: Row, fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if field not in row:
            raise TrainingError(f"{where}: the field {field!r} is missing; found {sorted(row)}")
        _check_messages(row[field], where=f"{where}, field {field!r}")
        last = row[field][-1]["role"]
        if field != "prompt" and last != "assistant":
            raise TrainingError(f"{where}, field {field!r}: ends with {last!r}, not an assistant")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise TrainingError(f"{where}: expected a list of chat messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TrainingError(f'{where}: a message is {{"role": ..., "content": "text"}}')
        if message.get("role") not in ROLES:
            raise TrainingError(f"{where}: role {message.get('role')!r} is not one of {ROLES}")
