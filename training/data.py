"""Rows for the training commands: what `judge.rows` reads, with errors as these commands give them."""

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
    """The rows of a source that can be used: `fields`, or those that a row has, are lists of messages.

    Raises:
        TrainingError: as `read_as`.
    """
    return read_as(source, fields, options, lambda row: row)


def read_as(
    source: str | Path,
    fields: tuple[str, ...],
    options: RowOptions,
    use: Callable[[Row], _Found],
    limit: int | None = None,
) -> list[_Found]:
    """What `use` makes of the first `limit` rows that can be used, None = all; what was skipped is printed.

    Args:
        use: raises ValueError for a row that the caller cannot use

    Raises:
        TrainingError: no such source, no rows, or too many that cannot be used.
    """
    try:
        found = [found for _, found in rows.read_rows(str(source), fields, options, use, limit)]
    except SourceError as error:
        raise TrainingError(str(error)) from None
    return found[:limit]
