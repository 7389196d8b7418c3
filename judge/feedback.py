"""Preferences that are kept: what people chose, and what the judge did, in any database that SQLAlchemy knows.

The server writes them; `training.export` reads them as preference data. A row is written, and on the disk, when `add`
returns.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    DDL,
    JSON,
    Column,
    Float,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from judge.layouts import PAIR, Row, conversational
from judge.messages import Message
from judge.rows import check_row

Source = Literal["person", "judge"]
Calls = list[dict[str, Any]]
SOURCES: tuple[Source, ...] = ("person", "judge")

_metadata = MetaData()
preferences = Table(
    "preferences",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("time", Float, nullable=False),  # seconds since 1970
    Column("source", String(16), nullable=False),  # person or judge
    Column("prompt", JSON, nullable=False),  # chat messages
    Column("chosen", Text, nullable=False),
    Column("rejected", Text, nullable=False),
    Column("principle", String(200)),  # what it was judged by
    Column("confidence", Float),  # of a judge: probability that `chosen` is better
    Column("chosen_calls", JSON(none_as_null=True)),  # of tools
    Column("rejected_calls", JSON(none_as_null=True)),
    Column("caller", String(200)),  # who chose, or whose request was judged
)
answers = Table(
    "answers",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("request_id", String(200), nullable=False, index=True),  # made by the server
    Column("prompt", JSON, nullable=False),
    Column("responses", JSON, nullable=False),  # messages, by index
    Column("caller", String(200)),  # whose request it was
)


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
    """Of tools, where the response is not a text alone."""
    rejected_calls: Calls | None = None
    caller: str | None = None
    """Who chose, or whose request was judged; None = of an earlier version."""

    def as_row(self) -> Row:
        """As preference data, in the form that training reads.

        Raises:
            Unusable: training could not read it.
            PrefersNothing: both responses are the same.
        """
        sides = (self.chosen, self.chosen_calls), (self.rejected, self.rejected_calls)
        chosen, rejected = (
            [{"role": "assistant", "content": text, "tool_calls": calls}] for text, calls in sides
        )
        row = {"prompt": list(self.prompt), "chosen": chosen, "rejected": rejected}
        (read,) = conversational(row | {"principle": self.principle}, PAIR)
        return check_row(read)


_COLUMNS = [preferences.c.id, *(preferences.c[field.name] for field in fields(Preference))]


class Feedback:
    """The database. Its methods block: call them from a thread of their own.

    Args:
        url: SQLAlchemy's, or the path of a SQLite file.
        create: make what is not there.

    Raises:
        FeedbackError: it cannot be opened.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.url = url
        try:
            self.engine = _open(url, create)
            if create:
                _metadata.create_all(self.engine)
            _add_columns(self.engine)
        except (SQLAlchemyError, ArgumentError, ImportError, OSError) as error:
            raise FeedbackError(f"cannot open {_without_password(url)}: {_cause(error)}") from None

    def add(self, rows: Sequence[Preference]) -> None:
        """Keep them, all or none.

        Raises:
            FeedbackError: they could not be written.
        """
        now = time.time()
        values = [
            {
                "time": now,
                "source": row.source,
                "prompt": list(row.prompt),
                "chosen": row.chosen,
                "rejected": row.rejected,
                "principle": row.principle,
                "confidence": row.confidence,
                "chosen_calls": row.chosen_calls,
                "rejected_calls": row.rejected_calls,
                "caller": row.caller,
            }
            for row in rows
        ]
        self._write(preferences, values)

    def add_answer(
        self, request_id: str, caller: str, prompt: Sequence[Message], responses: Sequence[Message]
    ) -> None:
        """Remember what a caller was answered, so that they may choose by its id.

        Raises:
            FeedbackError: it could not be written.
        """
        row = {"request_id": request_id, "caller": caller, "time": time.time()}
        self._write(answers, [row | {"prompt": list(prompt), "responses": list(responses)}])

    def answer(self, request_id: str, caller: str) -> tuple[list[Message], list[Message]] | None:
        """The prompt and the responses of a request; None = this caller has none of this id.

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
        """The last so many preferences of these sources and their ids, the newest first.

        Args:
            caller: only theirs; None = everybody's.

        Raises:
            FeedbackError: they could not be read.
        """
        query = select(*_COLUMNS).where(preferences.c.source.in_(sources))
        if caller is not None:
            query = query.where(preferences.c.caller == caller)
        return list(self._read(query.order_by(preferences.c.id.desc()).limit(count)))

    def last_id(self) -> int:
        """Of the newest preference; 0 = there is none.

        Raises:
            FeedbackError: it could not be read.
        """
        return self._select(select(func.max(preferences.c.id)))[0][0] or 0

    def counts(self) -> dict[tuple[Source, str | None], int]:
        """How many preferences there are of each source and caller.

        Raises:
            FeedbackError: they could not be read.
        """
        by = preferences.c.source, preferences.c.caller
        rows = self._select(select(*by, func.count()).group_by(*by))
        return {(source, caller): count for source, caller, count in rows}

    def forget(self, caller: str) -> dict[str, int]:
        """Delete a caller's preferences and answers, and say how many they were.

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
        self.engine.dispose()

    def _read(self, query: Select[Any]) -> Iterator[tuple[int, Preference]]:
        """Ids and preferences of a query of `_COLUMNS`."""
        try:
            with self.engine.connect() as connection:
                for number, *row in connection.execute(query):
                    yield number, Preference(*row)
        except (SQLAlchemyError, ValueError) as error:  # ValueError: what should be JSON is none
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


def _open(url: str, create: bool) -> Engine:
    if "://" not in url:
        path = Path(url).expanduser().absolute()
        if not create and not path.is_file():
            raise FileNotFoundError("there is no such file")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    engine = create_engine(url.replace(":///~/", f":///{Path.home()}/", 1))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, record: Any) -> None:
            # Readers do not wait for the writer, and what is committed outlives a power cut.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA busy_timeout=5000")

    return engine


def _add_columns(engine: Engine) -> None:
    """Those that a database of an earlier version has not."""
    for table in _metadata.sorted_tables:
        if not inspect(engine).has_table(table.name):
            raise FileNotFoundError(f"it has no table {table.name!r}")
        known = {column["name"] for column in inspect(engine).get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = column.type.compile(engine.dialect)
                with engine.begin() as connection:
                    connection.execute(
                        DDL(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")
                    )


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True) if "://" in url else url
    except ArgumentError:
        return "the database: its URL is malformed"


def _cause(error: Exception) -> str:
    """Without the statement and its parameters, which have people's texts in them."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def fingerprint(prompt: Sequence[Message], *responses: str) -> str:
    """Tells prompts with their responses apart, whatever the order of the responses."""
    content = json.dumps([list(prompt), sorted(responses)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
