"""Feedback as preference data: whose verdict counts, what is left out, and that training can read it."""

from collections import Counter
from pathlib import Path

import pytest

from judge.feedback import Feedback, Preference
from judge.messages import Message
from training import export
from training.console import TrainingError
from training.data import PAIR, read_rows

PROMPT: list[Message] = [{"role": "user", "content": "What is 2 + 2?"}]


def person(chosen: str, rejected: str) -> Preference:
    return Preference("person", PROMPT, chosen, rejected)


def judge(
    chosen: str, rejected: str, confidence: float = 0.8, principle: str | None = None
) -> Preference:
    return Preference("judge", PROMPT, chosen, rejected, principle, confidence)


def exported(*rows: Preference) -> tuple[list[tuple[str, str]], Counter[str]]:
    counts: Counter[str] = Counter()
    pairs = [
        (row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in export.export(rows, counts)
    ]
    return pairs, counts


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([person("a", "b"), person("a", "b")], [("a", "b")]),
        ([person("a", "b"), person("b", "a"), person("b", "a")], [("b", "a")]),
        ([person("a", "b"), person("b", "a")], []),
        ([judge("b", "a")] * 5 + [person("a", "b")], [("a", "b")]),
        ([judge("a", "b"), judge("b", "a"), judge("a", "b")], [("a", "b")]),
        ([person("a", "b"), person("b", "a"), judge("a", "b")], []),  # people do not agree
        ([person("a", "b"), person("b", "c")], [("a", "b"), ("b", "c")]),
        ([judge("a", "b"), judge("b", "a", principle="x")], [("a", "b"), ("b", "a")]),
    ],
)
def test_the_majority_decides_and_people_overrule_the_judge(rows, expected) -> None:
    pairs, counts = exported(*rows)
    assert pairs == expected
    assert counts["read"] == len(rows) and counts["written"] == len(expected)


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghij0123456789",
        "sk_live_abcdefghij0123456789",
        "hf_abcdefghijABCDEFGHIJklmn",
        "ghp_abcdefghijABCDEFGHIJ0123456789abcdef",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "xoxb-1234567890-abcdefghij",
        "AKIAIOSFODNN7EXAMPLE",
        "AIzaSyA-1234567890abcdefghijklmnopqrstu",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk",
        "Authorization: Bearer abcdef0123456789abcdef",
        "my password: hunter2hunter2",
        "API_KEY=0123456789abcdef",
        "postgres://me:s3cret@host/db",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_secrets_are_left_out(secret: str) -> None:
    pairs, counts = exported(person(f"Use {secret} here.", "No."))
    assert pairs == [] and counts["with what looks like a secret"] == 1
    preference = Preference("person", [{"role": "user", "content": secret}], "a", "b")
    assert exported(preference)[0] == []


@pytest.mark.parametrize(
    "text",
    [
        "My password is a secret; the API key too.",
        "See https://example.com/a:b@c for the bearer of news.",
        "The sk-learn package and a risk-averse disk-utility.",
        "I have 30 pounds for my rose.",
    ],
)
def test_plain_text_is_no_secret(text: str) -> None:
    assert not export.has_secret([text])


def test_the_command_writes_what_training_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feedback = Feedback(str(tmp_path / "feedback.db"))
    feedback.add([person("a", "b"), judge("c", "d", 0.9, "manners"), judge("e", "f", 0.6)])
    feedback.add([person("sk-abcdefghij0123456789", "b")])
    output = tmp_path / "new" / "preferences.jsonl"
    options = {"feedback": str(tmp_path / "feedback.db"), "output": output}
    export.main(export.Options(**options))
    rows = read_rows(output, PAIR)
    assert [row["chosen"][0]["content"] for row in rows] == ["a", "c", "e"]
    assert [row.get("principle") for row in rows] == [None, "manners", None]
    assert "1 with what looks like a secret" in capsys.readouterr().out
    for settings, expected in (
        ({"source": "person"}, ["a"]),
        ({"source": "judge"}, ["c", "e"]),
        ({"source": "judge", "min_confidence": 0.8}, ["c"]),
    ):
        export.main(export.Options(**options, **settings, overwrite=True))
        assert [row["chosen"][0]["content"] for row in read_rows(output)] == expected


def test_what_an_earlier_version_kept_and_training_cannot_read_is_left_out(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {"to": [2, 2]}}}]
    stored = [
        Preference("person", PROMPT, "\ud83d", "b"),
        Preference("person", [], "a", "b"),
        Preference("person", PROMPT, "", "b"),
        Preference("person", PROMPT, "a", "a"),
        Preference("person", [{"role": "developer", "content": "Add."}, *PROMPT], "4", "5"),
        Preference("person", PROMPT, "", "5", chosen_calls=call),
        Preference("person", PROMPT, "5", "", rejected_calls=call),
        Preference("person", PROMPT, "", "5", chosen_calls=call),
    ]
    feedback = Feedback(str(tmp_path / "feedback.db"))
    feedback.add(stored[4:])  # SQLite keeps no half of a surrogate pair; other databases may
    counts: Counter[str] = Counter()
    rows = list(export.export(stored, counts))
    assert counts == {"read": 8, "that training cannot read": 4, "written": 2}
    assert rows == list(export.export(feedback.rows(), Counter()))
    assert [row["chosen"][0] for row in rows] == [
        {"role": "assistant", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": call},  # two people of three
    ]
    options = export.Options(feedback=str(tmp_path / "feedback.db"), output=tmp_path / "out.jsonl")
    export.main(options)
    assert len(read_rows(options.output, PAIR)) == 2


def test_an_output_that_cannot_be(tmp_path: Path) -> None:
    Feedback(str(tmp_path / "feedback.db")).close()
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    for output, message in (
        ("directory", "is a directory, and must be a file"),
        ("file/x", "is a file, and must be a directory"),
        ("feedback.db", "is an input"),
    ):
        options = export.Options(
            feedback=str(tmp_path / "feedback.db"), output=tmp_path / output, overwrite=True
        )
        with pytest.raises(TrainingError, match=message):
            export.main(options)


def test_no_database(tmp_path: Path) -> None:
    options = export.Options(feedback=str(tmp_path / "none.db"), output=tmp_path / "x.jsonl")
    with pytest.raises(TrainingError, match="none.db: there is no such file"):
        export.main(options)
