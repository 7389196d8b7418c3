"""Bad rows are named by file and line."""

from pathlib import Path

import pytest

from tests.training.test_commands import BAD_LINES
from training.console import TrainingError
from training.data import read_rows

GOOD = '{"prompt": [{"role": "user", "content": "hello"}]}'


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(TrainingError) as error:
        read_rows(file, ("prompt",))
    assert message in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("field", ["messages", "chosen", "rejected"])
def test_what_is_to_be_learned_must_be_the_assistants(tmp_path: Path, field: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD.replace("prompt", field))
    with pytest.raises(TrainingError, match=f"line 1, field '{field}': ends with 'user'"):
        read_rows(file, (field,))


def test_blank_lines_are_skipped_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"\n{GOOD}\n\n")
    assert len(read_rows(file, ("prompt",))) == 1
    file.write_text("\n")
    with pytest.raises(TrainingError, match="no rows"):
        read_rows(file)
