"""Rows for the training commands: `judge.rows` with its errors as `TrainingError`."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from judge import rows
from judge.layouts import PAIR, Row
from judge.messages import Message
from judge.rows import ABOUT_A_PAIR, RATIONALE, RowOptions
from judge.sources import SourceError
from training.console import TrainingError

__all__ = [
    "ABOUT_A_PAIR", "PAIR", "RATIONALE", "Message", "Row", "RowOptions", "read_as", "read_rows",
]  # fmt: skip

_Found = TypeVar("_Found")
_DEFAULTS = RowOptions()


def read_rows(
    source: str | Path, fields: tuple[str, ...] = (), options: RowOptions = _DEFAULTS
) -> list[Row]:
    """The usable rows of a source. `fields`, or those that a row has, are lists of messages."""
    return read_as(source, fields, options, lambda row: row)


def read_as(
    source: str | Path,
    fields: tuple[str, ...],
    options: RowOptions,
    use: Callable[[Row], _Found],
    limit: int | None = None,
) -> list[_Found]:
    """The results of `use` on the first `limit` usable rows (None = all). Prints what was skipped.

    Args:
        use: converts a row; raises ValueError for a row that the caller cannot use

    Raises:
        TrainingError: there is no such source, it has no rows, or too many are unusable.
    """
    try:
        found = [found for _, found in rows.read_rows(str(source), fields, options, use, limit)]
    except SourceError as error:
        raise TrainingError(str(error)) from None
    return found[:limit]
