"""Public layouts of preference data, by hand-made rows of the same shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from training.console import TrainingError
from training.data import read_rows

FIELDS = ("prompt", "chosen", "rejected")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH_RLHF = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pun?\nPlease.\n\nAssistant: Lettuce\n\nbegin.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A pun?\nPlease.\n\nAssistant: No.",
}
ULTRAFEEDBACK: dict[str, Any] = {
    "source": "evol_instruct",
    "instruction": "Name a colour.",
    "models": ["a", "b", "c"],
    "completions": [
        {
            "model": "a",
            "response": "Blue?",
            "overall_score": 6.5,
            "annotations": {"honesty": {"Rating": "4"}},
        },
        {
            "model": "b",
            "response": "Blue.",
            "overall_score": 9.0,
            "annotations": {"honesty": {"Rating": "4"}},
        },
        {
            "model": "c",
            "response": "Table.",
            "overall_score": 1.0,
            "annotations": {"honesty": {"Rating": "4"}},
        },
    ],
}
BINARIZED = {
    "prompt": "Name a colour.",
    "prompt_id": "f0",
    "chosen": [user("Name a colour."), assistant("Blue.")],
    "rejected": [user("Name a colour."), assistant("Table.")],
    "messages": [user("Name a colour."), assistant("Blue.")],
    "score_chosen": 9.0,
    "score_rejected": 1.0,
}
PLAIN = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Table."}
COLOUR = {
    "prompt": [user("Name a colour.")],
    "chosen": [assistant("Blue.")],
    "rejected": [assistant("Table.")],
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hh-rlhf": (
        HH_RLHF,
        {
            "prompt": [user("Hi"), assistant("Hello!"), user("A pun?\nPlease.")],
            "chosen": [assistant("Lettuce\n\nbegin.")],
            "rejected": [assistant("No.")],
        },
    ),
    "UltraFeedback": (ULTRAFEEDBACK, COLOUR),
    "ultrafeedback_binarized": (BINARIZED, COLOUR),
    "plain": (PLAIN, COLOUR),
    "conversational": (COLOUR, COLOUR),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_known_by_its_fields(tmp_path: Path, layout: str, form: str) -> None:
    row, expected = LAYOUTS[layout]
    file = tmp_path / f"rows.{form}"
    if form == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        Dataset.from_list([row]).to_parquet(file)
    (found,) = read_rows(file, FIELDS)
    assert {field: found[field] for field in FIELDS} == expected


def test_rows_that_prefer_nothing_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    completions = [c | {"overall_score": 5} for c in ULTRAFEEDBACK["completions"]]
    file = tmp_path / "rows.jsonl"
    rows = (ULTRAFEEDBACK, ULTRAFEEDBACK | {"completions": completions})
    file.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_rows(file, FIELDS)) == 1
    assert "left out 1 rows that prefer nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (HH_RLHF | {"chosen": "Hello"}, 'begins with "\\\\n\\\\nHuman: "'),
        (BINARIZED | {"rejected": [user("Other"), assistant("x")]}, "differ before their last"),
        (BINARIZED | {"rejected": []}, "at least two turns"),
        (ULTRAFEEDBACK | {"completions": [{"response": "x"}] * 2}, "no overall_score"),
    ],
)
def test_a_row_that_breaks_its_layout_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=f"line 2: .*{message}"):
        read_rows(file, FIELDS)


def test_what_is_neither_file_nor_data_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match="nobody/nothing:test: neither a file nor a data set"):
        read_rows("nobody/nothing:test", FIELDS)
