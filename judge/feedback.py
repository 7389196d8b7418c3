"""Preferences in a database: what people chose, and what the judge decided.

The server writes them; `training.export` reads them as preference data. A row is on the disk when `add` returns.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sqlalchemy import Select, Table, delete, func, insert, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from judge.feedback_tables import answers, open_database, preferences, without_password
from judge.layouts import PAIR, Row, conversational
from judge.messages import Message
from judge.rows import check_row

Source = Literal["person", "judge"]
Calls = list[dict[str, Any]]
SOURCES: tuple[Source, ...] = ("person", "judge")


class FeedbackError(ValueError):
    """The database cannot be used; the message says why."""


@dataclass(frozen=True)
class Preference:
    """One response is better than another."""

    source: Source
    prompt: Sequence[Message]
    chosen: str
    rejected: str
    principle: str | None = None
    confidence: float | None = None
    chosen_calls: Calls | None = None
    """Tool calls, where the response is not a text alone."""
    rejected_calls: Calls | None = None
    caller: str | None = None
    """Who chose, or whose request was judged; None = the row is of an earlier version."""

    def as_row(self) -> Row:
        """As preference data, in the form that training reads.

        Raises:
            Unusable: training cannot read it.
            PrefersNothing: both responses are the same.
        """
        sides = (self.chosen, self.chosen_calls), (self.rejected, self.rejected_calls)
        chosen, rejected = (
            [{"role": "assistant", "content": text, "tool_calls": calls}] for text, calls in sides
        )
        row = {"prompt": list(self.prompt), "chosen": chosen, "rejected": rejected}
        (pair,) = conversational(row | {"principle": self.principle}, PAIR)
        return check_row(pair)


_COLUMNS = [preferences.c.id, *(preferences.c[field.name] for field in fields(Preference))]


class Feedback:
    """The database. Its methods block: call them from a thread of their own.

    Args:
        url: SQLAlchemy's, or the path of a SQLite file.
        create: make missing files and tables.

    Raises:
        FeedbackError: it cannot be opened.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.url = url
        try:
            self.engine = open_database(url, create=create)
        except (SQLAlchemyError, ArgumentError, ImportError, OSError) as error:
            raise FeedbackError(f"cannot open {without_password(url)}: {_cause(error)}") from None

    def add(self, rows: Sequence[Preference]) -> None:
        """Write rows, all or none.

        Raises:
            FeedbackError: they could not be written.
        """
        now = time.time()
        values = [asdict(row) | {"time": now, "prompt": list(row.prompt)} for row in rows]
        self._write(preferences, values)

    def add_answer(
        self, request_id: str, caller: str, prompt: Sequence[Message], responses: Sequence[Message]
    ) -> None:
        """Keep the responses to a caller's request, so that the caller can choose by its id.

        Raises:
            FeedbackError: it could not be written.
        """
        row = {"request_id": request_id, "caller": caller, "time": time.time()}
        self._write(answers, [row | {"prompt": list(prompt), "responses": list(responses)}])

    def answer(self, request_id: str, caller: str) -> tuple[list[Message], list[Message]] | None:
        """The prompt and the responses of a request; None = this caller has no request of this id.

        Raises:
            FeedbackError: it could not be read.
        """
        query = select(answers.c.prompt, answers.c.responses).where(
            answers.c.request_id == request_id, answers.c.caller == caller
        )
        rows = self._select(query.limit(1))
        return (rows[0].prompt, rows[0].responses) if rows else None

    def rows(self) -> Iterator[Preference]:
        """All preferences, the oldest first.

        Raises:
            FeedbackError: they could not be read.
        """
        for _, row in self._read(select(*_COLUMNS).order_by(preferences.c.id)):
            yield row

    def newest(
        self, count: int, sources: Sequence[Source], caller: str | None = None
    ) -> list[tuple[int, Preference]]:
        """The last `count` preferences of these sources with their ids, the newest first.

        Args:
            caller: whose preferences; None = everybody's.

        Raises:
            FeedbackError: they could not be read.
        """
        query = select(*_COLUMNS).where(preferences.c.source.in_(sources))
        if caller is not None:
            query = query.where(preferences.c.caller == caller)
        return list(self._read(query.order_by(preferences.c.id.desc()).limit(count)))

    def last_id(self) -> int:
        """Id of the newest preference; 0 = there is none.

        Raises:
            FeedbackError: it could not be read.
        """
        return self._select(select(func.max(preferences.c.id)))[0][0] or 0

    def counts(self) -> dict[tuple[Source, str | None], int]:
        """The number of preferences of each source and caller.

        Raises:
            FeedbackError: they could not be read.
        """
        by = preferences.c.source, preferences.c.caller
        rows = self._select(select(*by, func.count()).group_by(*by))
        return {(source, caller): count for source, caller, count in rows}

    def forget(self, caller: str) -> dict[str, int]:
        """Delete a caller's preferences and answers; returns their numbers by table.

        Raises:
            FeedbackError: nothing was deleted.
        """
        try:
            with self.engine.begin() as connection:
                return {
                    table.name: connection.execute(
                        delete(table).where(table.c.caller == caller)
                    ).rowcount
                    for table in (preferences, answers)
                }
        except SQLAlchemyError as error:
            raise FeedbackError(f"feedback could not be deleted: {_cause(error)}") from None

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _read(self, query: Select[Any]) -> Iterator[tuple[int, Preference]]:
        """Ids and preferences of a query of `_COLUMNS`."""
        try:
            with self.engine.connect() as connection:
                for number, *row in connection.execute(query):
                    yield number, Preference(*row)
        except (
            SQLAlchemyError,
            ValueError,
        ) as error:  # ValueError: a JSON column holds something else
            raise FeedbackError(f"feedback could not be read: {_cause(error)}") from None

    def _select(self, query: Select[Any]) -> Sequence[Any]:
        try:
            with self.engine.connect() as connection:
                return connection.execute(query).all()
        except SQLAlchemyError as error:
            raise FeedbackError(f"feedback could not be read: {_cause(error)}") from None

    def _write(self, table: Table, values: list[dict[str, Any]]) -> None:
        if not values:
            return
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(table), values)
        except SQLAlchemyError as error:
            raise FeedbackError(f"feedback could not be kept: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """Without the statement and its parameters, which contain people's texts."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def fingerprint(prompt: Sequence[Message], *responses: str) -> str:
    """Identifies a prompt with its responses, in any order of the responses."""
    content = json.dumps([list(prompt), sorted(responses)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
