"""Files in every encoding and form, and broken files."""

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from judge.messages import Unusable
from judge.sources import SourceError, parse, raw_rows

ROWS: list[dict[str, Any]] = [{"prompt": "Is the café open?"}, {"prompt": "日本 🙂\u2028"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(source: str | Path) -> list[dict[str, Any]]:
    return [parse(row) for _, row in raw_rows(str(source))]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.encode("utf-16-le"),
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r\n").encode(),
        f"\n \n{LINES}\n".encode(),
        LINES.rstrip().encode(),
        gzip.compress(LINES.encode("utf-8-sig")),
        json.dumps(ROWS).encode(),
        b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    ],
    ids=["UTF-8", "BOM", "UTF-16", "UTF-16 without BOM", "UTF-32", "CRLF", "blank lines", "no last line end",
         "gzip", "array", "indented array"],
)  # fmt: skip
def test_every_encoding_and_form_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows").write_bytes(content)
    assert rows_of(tmp_path / "rows") == ROWS


def test_parquet_has_no_nulls_that_nobody_wrote(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user"}, {"content": "x"}]}, {"subset": "a"}]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([
        ("prompt", pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))), ("subset", pa.string()),
    ])), tmp_path / "rows.parquet")  # fmt: skip
    assert rows_of(tmp_path / "rows.parquet") == rows
    assert [location for location, _ in raw_rows(f"{tmp_path}/rows.parquet")] == [
        f"{tmp_path}/rows.parquet, row {number}" for number in (1, 2)
    ]


def test_a_path_may_begin_at_home_and_be_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(LINES)
    assert rows_of("~/rows.jsonl") == ROWS
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(LINES,))
    writer.start()
    assert rows_of(tmp_path / "pipe") == ROWS
    writer.join()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": [', r"not JSON \(Expecting value, column 13\)"),
        ("[" * 100_000, "not JSON"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{LINES}{line}\n{LINES}")
    rows = list(raw_rows(f"{tmp_path}/rows.jsonl"))
    assert [parse(rows[i][1]) for i in (0, 1, 3, 4)] == ROWS + ROWS
    assert rows[2][0].endswith("rows.jsonl, line 3")
    with pytest.raises(Unusable, match=message):
        parse(rows[2][1])


def test_a_line_in_latin_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(Unusable, match=r"not UTF-8 text \(byte 0xe9 in column 16; Latin-1\?"):
        rows_of(tmp_path / "rows.jsonl")


def test_lines_that_are_arrays_are_no_array(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"[1]\n{LINES}")
    assert [parse(row) for _, row in list(raw_rows(f"{tmp_path}/rows.jsonl"))[1:]] == ROWS


def write_broken_files(directory: Path) -> dict[str, str]:
    """Write files that cannot be read. Returns each file's name with its error message."""
    (directory / "dir.jsonl").mkdir()
    (directory / "text.parquet").write_text(LINES)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, directory / "cut.parquet")
    content = (directory / "cut.parquet").read_bytes()
    (directory / "cut.parquet").write_bytes(content[: len(content) // 2])
    compressed = gzip.compress(LINES.encode() * 100)
    (directory / "cut.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    (directory / "bad.jsonl.gz").write_bytes(compressed[:20] + b"xxxxxxxx" + compressed[28:])
    (directory / "utf16.jsonl").write_bytes(LINES.encode("utf-16") + b"\x00\xd8\x41")
    return {
        "dir.jsonl": "is a directory",
        "text.parquet": "is not a Parquet file",
        "cut.parquet": "a broken Parquet file",
        "cut.jsonl.gz": "cannot be read: Compressed file ended",
        "bad.jsonl.gz": "cannot be read",
        "utf16.jsonl": "cannot be read: 'utf-16",
        "none.jsonl": "no such file",
        "x" * 300 + ".jsonl": "cannot be read: File name too long",
    }


def test_what_is_broken_is_said_in_one_line(tmp_path: Path) -> None:
    for name, message in write_broken_files(tmp_path).items():
        with pytest.raises(SourceError) as error:
            rows_of(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path}/{name}: {message}")
        assert "\n" not in str(error.value)


def test_what_is_neither_file_nor_data_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="nobody/nothing:test: neither a file nor a data set"):
        rows_of("nobody/nothing:test")
    for name in ("rows.jsonl", "./rows", "/no/rows", "data/rows.csv"):
        with pytest.raises(SourceError, match=f"{name}: no such file"):
            rows_of(name)
