"""Bad rows are named by file and line."""

from pathlib import Path

import pytest

from tests.training.test_commands import BAD_LINES
from training.console import TrainingError
from training.data import PAIR, Row, RowOptions, read_as, read_rows

GOOD = '{"prompt": [{"role": "user", "content": "hello"}]}'


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(TrainingError) as error:
        read_rows(file, ("prompt",))
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_blank_lines_are_skipped_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"\n{GOOD}\n\n")
    assert len(read_rows(file, ("prompt",))) == 1
    file.write_text("\n")
    with pytest.raises(TrainingError, match="no rows"):
        read_rows(file)


def test_so_many_rows_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    pairs = '{"prompt": "2 + 2?", "chosen": ["4"], "rejected": ["3", "5", "6"]}\n'
    file.write_text(pairs * 2)

    def rejected_text(row: Row) -> str:
        return row["rejected"][0]["content"]

    assert read_as(file, PAIR, RowOptions(), rejected_text, 4) == ["3", "5", "6", "3"]
