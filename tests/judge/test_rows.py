"""Which rows can be used, and how the others are reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from judge.layouts import PAIR, VERDICT
from judge.rows import RowOptions, read_rows
from judge.sources import SourceError

HUMAN = "\n\nHuman: "
ASSISTANT = "\n\nAssistant: "
GOOD = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
DIALOGUE = f"{HUMAN}Hi{ASSISTANT}Hello!{HUMAN}A pun?"
# As in HH-RLHF's real files: one side has two assistant turns, or ends with an empty one.
SEVERAL_TURNS = {
    "chosen": f"{DIALOGUE}{ASSISTANT}Lettuce begin.{ASSISTANT}Ha.",
    "rejected": f"{DIALOGUE}{ASSISTANT}No.",
}
SILENT = {"chosen": f"{DIALOGUE}{ASSISTANT}", "rejected": f"{DIALOGUE}{ASSISTANT}No."}


def read(
    file: Path,
    rows: list[Any],
    fields: tuple[str, ...] = PAIR,
    *,
    limit: int | None = None,
    **options: Any,
) -> list[str]:
    """The lines of the file whose rows can be used."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    usable = read_rows(str(file), fields, RowOptions(**options), lambda row: row, limit)
    return [location.removeprefix(f"{file}, line ") for location, _ in usable]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_what_cannot_be_used_is_skipped_counted_and_shown(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD] * 26 + [SEVERAL_TURNS, SILENT, SEVERAL_TURNS, '{"prompt": "Hi"']
    assert read(file, rows, max_skipped=0.2) == [str(i) for i in range(1, 27)]
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: skipped 4 of 30 rows that cannot be used:",
        "  2 like line 27: an answer of several turns (chosen and rejected differ before their last turn): "
        + json.dumps(SEVERAL_TURNS)[:100]
        + " ...",
        "  1 like line 28: the chosen answer is empty: " + json.dumps(SILENT)[:100] + " ...",
        "  1 like line 30: not JSON (Expecting ',' delimiter, column 16): " + '{"prompt": "Hi"',
    ]


def test_too_many_of_them_are_a_file_of_another_kind(file: Path) -> None:
    assert len(read(file, [GOOD] * 9 + [SILENT])) == 9  # a tenth may be skipped
    with pytest.raises(SourceError) as error:
        read(file, [GOOD] * 8 + [SILENT, SEVERAL_TURNS, SILENT])
    assert str(error.value) == (
        f"{file}, line 9: the chosen answer is empty; 3 of 11 rows cannot be used, and --max-skipped allows a share "
        "of 0.1: is it a file of another kind?"
    )
    assert len(read(file, [GOOD, SILENT], max_skipped=0.5)) == 1
    with pytest.raises(SourceError, match="line 1: .* 1 of 1 rows cannot be used"):
        read(file, [SILENT], max_skipped=1)


def test_strict_skips_none(file: Path) -> None:
    with pytest.raises(SourceError) as error:
        read(file, [GOOD] * 99 + [SILENT], strict=True)
    assert str(error.value) == f"{file}, line 100: the chosen answer is empty"
    assert len(read(file, [GOOD, GOOD | {"rejected": "Hello!"}], strict=True)) == 1


def test_pairs_that_prefer_nothing_are_left_out_however_many(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(file, [GOOD | {"rejected": "Hello!"}] * 3 + [GOOD]) == ["4"]
    assert f"{file}: left out 3 of 4 rows that prefer nothing" in capsys.readouterr().out
    with pytest.raises(SourceError, match="no row prefers anything: both answers are the same"):
        read(file, [GOOD | {"chosen": "Go away."}])


def test_no_rows(file: Path) -> None:
    for rows in ([], ["", "  "]):
        with pytest.raises(SourceError, match="rows.jsonl: there are no rows"):
            read(file, rows)


def test_a_limit_reads_no_further(file: Path) -> None:
    assert read(file, [SILENT, GOOD, GOOD, "no row"], limit=2, max_skipped=0.5) == ["2", "3"]


def test_what_a_caller_cannot_use_is_skipped_alike(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("".join(json.dumps(GOOD | {"prompt": text}) + "\n" for text in "ab" * 10))

    def use(row: dict[str, Any]) -> str:
        text: str = row["prompt"][0]["content"]
        if text == "b":
            raise ValueError("b is not for us")
        return text

    result = read_rows(str(file), PAIR, RowOptions(max_skipped=0.5), use)
    assert [text for _, text in result] == ["a"] * 10
    assert "10 like line 2: b is not for us" in capsys.readouterr().out


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"name": "now", "arguments": "{}"}]}
TOOL = {"role": "tool", "content": "12:00"}
MESSAGES = ("messages",)
PROMPT = ("prompt",)


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        (PAIR, GOOD | {"rejected": ""}),  # an empty answer may be the worse one
        (PAIR, GOOD | {"principle": "manners", "rationale_chosen": "a", "rationale_rejected": "b"}),
        (PAIR, GOOD | {"principle": None, "rationale_chosen": None}),
        (PAIR, {"prompt": [USER], "chosen": [CALLS], "rejected": [REPLY]}),
        (PAIR, {"prompt": [USER, CALLS, TOOL], "chosen": [REPLY], "rejected": "No."}),
        (PAIR, {"prompt": [{**USER, "role": "developer"}, USER], "chosen": "a", "rejected": "b"}),
        (MESSAGES, {"messages": [USER, REPLY, USER, CALLS, TOOL, REPLY]}),
        (MESSAGES, {"messages": [USER, CALLS]}),
        (PROMPT, {"prompt": [USER, CALLS, {**TOOL, "content": ""}]}),
        (PROMPT, SEVERAL_TURNS),  # its prompt can be used
        (PROMPT, SILENT),
        ((), {"messages": [USER, REPLY], "chosen": 5}),
        ((), GOOD),
        (VERDICT, {"prompt": "Hi", "completion": "Hello!", "label": True}),
        ((), {"prompt": "Hi", "completion": "Hello!"}),  # a prompt; the other fields do not matter
        ((), {"prompt": [USER], "completion": [{**REPLY, "content": ""}], "label": False}),
        ((), {"prompt": "Hi", "messages": None}),
    ],
)
def test_what_can_be_used(file: Path, fields: tuple[str, ...], row: dict[str, Any]) -> None:
    assert read(file, [row], fields, strict=True) == ["1"]


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        (
            PAIR,
            {"prompt": [USER], "chosen": [CALLS, TOOL, REPLY], "rejected": [REPLY]},
            "several tu",
        ),
        (
            PAIR,
            {"chosen": [USER, REPLY], "rejected": [{**USER, "content": "x"}, REPLY]},
            "no prompt",
        ),
        (PAIR, GOOD | {"prompt": [USER, REPLY]}, "prompt ends with the assistant's turn"),
        (PAIR, GOOD | {"prompt": " "}, "the prompt is empty"),
        (PAIR, GOOD | {"chosen": " \n"}, "the chosen answer is empty"),
        (
            PAIR,
            {"prompt": [USER], "chosen": [USER], "rejected": [REPLY]},
            "chosen ends with 'user'",
        ),
        (PAIR, {"prompt": [USER], "chosen": [REPLY], "rejected": [USER]}, "rejected ends with 'us"),
        (PAIR, GOOD | {"chosen": "\ud83d"}, "chosen: a text is not Unicode"),
        (PAIR, GOOD | {"principle": "\ud83d"}, "a text is not Unicode"),
        (PAIR, GOOD | {"principle": 5}, "principle must be texts"),
        (PAIR, GOOD | {"rationale_chosen": "a"}, "a rationale is two texts"),
        (PAIR, GOOD | {"rationale_chosen": "a", "rationale_rejected": 5}, "must be texts"),
        (MESSAGES, {"messages": [USER]}, "messages ends with 'user', not an assistant"),
        (MESSAGES, {"messages": [USER, {**REPLY, "content": ""}]}, "the answer is empty"),
        (MESSAGES, {"messages": "Hi"}, "messages: expected a list of chat messages"),
        (VERDICT, {"prompt": "Hi", "completion": "Hello!", "label": "yes"}, "not true or false"),
        (VERDICT, {"prompt": "Hi", "completion": " ", "label": True}, "completion answer is empty"),
        (
            VERDICT,
            {"prompt": "Hi", "completion": [CALLS, TOOL], "label": True},
            "not a single turn",
        ),
        (PROMPT, {"prompt": [USER, REPLY]}, "prompt ends with the assistant's turn"),
        (PROMPT, {"text": "Hi"}, r"the field 'prompt' is missing \(found text\)"),
    ],
)
def test_what_cannot(
    file: Path, fields: tuple[str, ...], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=f"line 1: .*{message}"):
        read(file, [row], fields, strict=True)
