"""Raw rows of a file or a data set, each with its place.

A file is JSON lines or a JSON array, in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32, or Parquet; gzip
is unpacked. Its first bytes tell the format. Anything else is a data set's name for `datasets.load_dataset`, with a
split after a colon: `HuggingFaceH4/ultrafeedback_binarized:train_prefs`.
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from judge.messages import Unusable

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_SUFFIXES = {".jsonl", ".json", ".parquet", ".gz", ".csv", ".tsv", ".txt"}
"""A name with such a suffix is a file's."""


class SourceError(ValueError):
    """A source cannot be read; the message names it and says why."""


def raw_rows(source: str) -> Iterator[tuple[str, Any]]:
    """The place of each row, and the row: a line of JSON for `parse`, or an object.

    Raises:
        SourceError: the source is missing or broken.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise SourceError(f"{source}: is a directory; name a file in it")
        if path.exists():
            yield from _rows_of_file(source, path)
            return
    except (OSError, EOFError, zlib.error, UnicodeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{source}: cannot be read: {reason}") from None
    if path.suffix in _SUFFIXES or path.is_absolute() or source.startswith("."):
        raise SourceError(f"{source}: no such file")
    name, _, split = source.partition(":")
    yield from _numbered(source, map(_without_nulls, _load_dataset(source, name, split or "train")))


def parse(row: Any) -> dict[str, Any]:
    """A row as an object.

    Raises:
        Unusable: it is no JSON object.
    """
    if isinstance(row, str):
        try:
            row.encode()
            row = json.loads(row.rstrip())
        except UnicodeEncodeError as error:
            byte = ord(row[error.start]) & 0xFF
            hint = f"byte 0x{byte:02x} in column {error.start + 1}; Latin-1? iconv -f latin1 -t utf-8 converts it"
            raise Unusable("not UTF-8 text", hint) from None
        except json.JSONDecodeError as error:
            raise Unusable("not JSON", f"{error.msg}, column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise Unusable("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise Unusable(f"expected a JSON object, got {type(row).__name__}")
    return row


def _rows_of_file(source: str, path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        start = file.peek(4)[:4]
        if start == _PARQUET:
            yield from _numbered(source, _rows_of_parquet(source, path))
        elif path.suffix == ".parquet":
            raise SourceError(f"{source}: is not a Parquet file")
        elif start.startswith(_GZIP):
            with gzip.open(file) as packed, io.BufferedReader(packed) as unpacked:
                yield from _rows_of_text(source, unpacked, unpacked.peek(4)[:4])
        else:
            yield from _rows_of_text(source, file, start)


def _rows_of_text(source: str, file: BinaryIO, start: bytes) -> Iterator[tuple[str, Any]]:
    encoding = json.detect_encoding(start)
    with io.TextIOWrapper(file, encoding, errors="surrogateescape") as text:
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        first = list(itertools.islice(lines, 1))
        if first and first[0][1].lstrip().startswith("["):
            first += lines
            if (array := _array("".join(line for _, line in first))) is not None:
                yield from _numbered(source, array)
                return
        for number, line in itertools.chain(first, lines):
            yield f"{source}, line {number}", line


def _array(text: str) -> list[Any] | None:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # lines, of which the first is an array


def _rows_of_parquet(source: str, path: Path) -> Iterator[Any]:
    import pyarrow as pa  # here: the server does not need it
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from map(_without_nulls, batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{source}: a broken Parquet file: {_first_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Without the nulls that Arrow adds so that all objects of a column have the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _load_dataset(source: str, name: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # loaders raise many kinds
        raise SourceError(
            f"{source}: neither a file nor a data set that can be loaded ({_first_line(error)})"
        ) from None


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
