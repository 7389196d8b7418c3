"""The tables of the feedback database, in any database that SQLAlchemy knows, and opening one."""

from pathlib import Path
from typing import Any

from sqlalchemy import (
    DDL,
    JSON,
    Column,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
)
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError

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
    Column("principle", String(200)),  # that the judge used
    Column("confidence", Float),  # of a judge: probability that `chosen` is better
    Column("chosen_calls", JSON(none_as_null=True)),  # tool calls
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


def open_database(url: str, *, create: bool) -> Engine:
    """A database with all tables and columns.

    Args:
        url: SQLAlchemy's, or the path of a SQLite file.
        create: make missing files and tables.

    Raises SQLAlchemyError, ImportError (no driver) or OSError.
    """
    engine = _connect(url, create)
    if create:
        _metadata.create_all(engine)
    _add_columns(engine)
    return engine


def _connect(url: str, create: bool) -> Engine:
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
            # Readers do not wait for the writer, and a power cut loses nothing that was committed.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA busy_timeout=5000")

    return engine


def _add_columns(engine: Engine) -> None:
    """Add the columns that the database of an earlier version lacks."""
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


def without_password(url: str) -> str:
    """The URL for a message."""
    try:
        return make_url(url).render_as_string(hide_password=True) if "://" in url else url
    except ArgumentError:
        return "the database: its URL is malformed"
