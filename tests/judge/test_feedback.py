"""Feedback in a real SQLite file: what is stored, what survives a kill, and the errors of a broken database."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from judge.feedback import Feedback, FeedbackError, Preference, fingerprint
from judge.messages import Message, Unusable
from judge.rows import PrefersNothing

PROMPT: list[Message] = [{"role": "user", "content": "What is 2 + 2? é"}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"to": [2, 2]}}}]
BY_PERSON = Preference("person", PROMPT, "Four.", "Five.")
BY_JUDGE = Preference("judge", PROMPT, "4", "5", "overall", 0.75)


def test_what_is_kept_is_read_again(tmp_path):
    path = str(tmp_path / "new" / "feedback.db")
    feedback = Feedback(path)
    feedback.add([BY_PERSON, BY_JUDGE])
    feedback.add([])
    feedback.close()
    assert list(Feedback(path, create=False).rows()) == [BY_PERSON, BY_JUDGE]
    assert list(Feedback(f"sqlite:///{path}").rows()) == [BY_PERSON, BY_JUDGE]


def test_answers_are_their_callers(tmp_path):
    feedback = Feedback(str(tmp_path / "feedback.db"))
    tool_message = Message(role="assistant", content="", tool_calls=CALLS)
    responses = [Message(role="assistant", content="Four."), tool_message]
    feedback.add_answer("chatcmpl-1", "alice", PROMPT, responses)
    assert feedback.answer("chatcmpl-1", "alice") == (PROMPT, responses)
    assert feedback.answer("chatcmpl-1", "bob") is None
    assert feedback.answer("chatcmpl-2", "alice") is None


def test_a_preference_as_data():
    by_tool = Preference("person", PROMPT, "", "Go away.", "manners", chosen_calls=CALLS)
    assert by_tool.as_row() == {
        "prompt": PROMPT,
        "chosen": [{"role": "assistant", "content": "", "tool_calls": CALLS}],
        "rejected": [{"role": "assistant", "content": "Go away."}],
        "principle": "manners",
    }
    for preference in (
        Preference("person", PROMPT, "\ud83d", "a"),
        Preference("person", [{"role": "user", "content": "\ud83d"}], "a", "b"),
        Preference("person", PROMPT, "", "a"),
        Preference("person", [], "a", "b"),
        Preference("person", [*PROMPT, {"role": "robot", "content": "x"}], "a", "b"),
    ):
        with pytest.raises(Unusable):
            preference.as_row()
    with pytest.raises(PrefersNothing):
        Preference("person", PROMPT, "a", "a").as_row()


def test_a_database_of_an_earlier_version(tmp_path):
    """Missing columns are added, and its rows can be read."""
    path = tmp_path / "feedback.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE preferences (id INTEGER PRIMARY KEY, time FLOAT NOT NULL, source VARCHAR(16) NOT NULL, "
            "prompt JSON NOT NULL, chosen TEXT NOT NULL, rejected TEXT NOT NULL, principle VARCHAR(200), "
            "confidence FLOAT)"
        )
        connection.execute(
            "CREATE TABLE answers (id INTEGER PRIMARY KEY, time FLOAT NOT NULL, request_id VARCHAR(200) NOT NULL, "
            "prompt JSON NOT NULL, responses JSON NOT NULL)"
        )
        connection.execute(
            "INSERT INTO preferences VALUES (1, 0, 'person', ?, 'Four.', 'Five.', NULL, NULL)",
            [json.dumps(PROMPT)],
        )
        connection.execute(
            "INSERT INTO answers VALUES (1, 0, 'chatcmpl-1', '[]', '[\"a\", \"b\"]')"
        )
    connection.close()
    feedback = Feedback(str(path), create=False)
    by_tool = Preference("person", PROMPT, "", "a", chosen_calls=CALLS)
    feedback.add([by_tool])
    assert list(feedback.rows()) == [BY_PERSON, by_tool]
    assert feedback.answer("chatcmpl-1", "anybody") is None  # its caller was not stored


def test_what_is_broken_is_said_when_it_is_read(tmp_path):
    feedback = Feedback(str(tmp_path / "feedback.db"))
    feedback.add([BY_PERSON])
    with sqlite3.connect(tmp_path / "feedback.db") as connection:
        connection.execute("UPDATE preferences SET prompt = 'x'")
    connection.close()
    with pytest.raises(FeedbackError, match="feedback could not be read: Expecting value"):
        list(feedback.rows())
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(FeedbackError, match="other.db: it has no table 'answers'"):
        Feedback(str(tmp_path / "other.db"), create=False)


def test_what_add_returned_from_outlives_a_kill(tmp_path):
    path = tmp_path / "feedback.db"
    script = f"""
import os, signal
from judge.feedback import Feedback, Preference
feedback = Feedback({str(path)!r})
for i in range(20):
    feedback.add([Preference("person", [], str(i), "no")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=Path.cwd(), check=False)
    assert result.returncode == -signal.SIGKILL
    assert [row.chosen for row in Feedback(str(path)).rows()] == [str(i) for i in range(20)]


def test_many_threads_at_once(tmp_path):
    feedback = Feedback(str(tmp_path / "feedback.db"))

    def add(name: str) -> None:
        for i in range(20):
            feedback.add([Preference("person", [], f"{name} {i}", "no")])

    threads = [threading.Thread(target=add, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({row.chosen for row in feedback.rows()}) == 80


def test_a_database_that_is_locked_says_so_and_loses_nothing(tmp_path):
    path = tmp_path / "feedback.db"
    feedback = Feedback(str(path))
    feedback.add([BY_PERSON])
    with feedback.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=10")
    other_connection = sqlite3.connect(path)
    other_connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(FeedbackError, match="feedback could not be kept: database is locked"):
        feedback.add([BY_JUDGE])
    other_connection.rollback()
    feedback.add([BY_JUDGE])
    assert list(feedback.rows()) == [BY_PERSON, BY_JUDGE]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://x", "cannot open nonsense://x: Can't load plugin"),
        ("://", "cannot open the database: its URL is malformed"),
        (
            "postgresql://me:s3cret@localhost/x",
            r"cannot open postgresql://me:\*\*\*@localhost/x: No",
        ),
    ],
)
def test_urls_that_cannot_be(url, message):
    with pytest.raises(FeedbackError, match=message) as raised:
        Feedback(url)
    assert "s3cret" not in str(raised.value)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "x").write_text("hello " * 100)
    with pytest.raises(FeedbackError, match="x: file is not a database"):
        Feedback(str(tmp_path / "x"))
    with pytest.raises(FeedbackError, match="none: there is no such file"):
        Feedback(str(tmp_path / "none"), create=False)


def test_fingerprints_do_not_see_the_order_of_the_responses():
    assert fingerprint(PROMPT, "a", "b") == fingerprint(PROMPT, "b", "a")
    assert fingerprint(PROMPT, "a", "b") != fingerprint(PROMPT, "a", "c")
    assert fingerprint(PROMPT, "a", "b") != fingerprint([], "a", "b")


def test_a_callers_are_found_counted_and_forgotten(tmp_path):
    feedback = Feedback(str(tmp_path / "feedback.db"))
    assert (feedback.last_id(), feedback.counts()) == (0, {})
    by_caller = {name: replace(BY_PERSON, caller=name) for name in ("alice", "bob")}
    feedback.add(
        [by_caller["alice"], by_caller["bob"], BY_PERSON, replace(BY_JUDGE, caller="alice")]
    )
    feedback.add_answer("chatcmpl-1", "alice", PROMPT, [])
    assert feedback.last_id() == 4
    assert feedback.counts() == {
        ("person", "alice"): 1, ("person", "bob"): 1, ("person", None): 1, ("judge", "alice"): 1,
    }  # fmt: skip
    assert [row_id for row_id, _ in feedback.newest(2, ["person"])] == [3, 2]
    assert feedback.newest(9, ["person"], "alice") == [(1, by_caller["alice"])]
    assert [row_id for row_id, _ in feedback.newest(9, ["person", "judge"], "alice")] == [4, 1]
    assert feedback.forget("alice") == {"preferences": 2, "answers": 1}
    assert list(feedback.rows()) == [by_caller["bob"], BY_PERSON]
    assert feedback.answer("chatcmpl-1", "alice") is None
    assert feedback.forget("alice") == {"preferences": 0, "answers": 0}
