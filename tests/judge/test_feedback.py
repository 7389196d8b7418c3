"""Feedback in a real SQLite file: what is kept, what outlives a kill, and what a broken database says."""

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from judge.feedback import Feedback, FeedbackError, Preference, fingerprint

PROMPT = [{"role": "user", "content": "What is 2 + 2? é"}]
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


def test_answers_by_their_id(tmp_path):
    feedback = Feedback(str(tmp_path / "feedback.db"))
    feedback.add_answer("chatcmpl-1", PROMPT, ["Four.", "Five."])
    feedback.add_answer("chatcmpl-1", PROMPT, ["4", "5"])
    assert feedback.answer("chatcmpl-1") == (PROMPT, ["4", "5"])  # the last of that id
    assert feedback.answer("chatcmpl-2") is None


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
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path.cwd(), check=False)
    assert ended.returncode == -signal.SIGKILL
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
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(FeedbackError, match="feedback could not be kept: database is locked"):
        feedback.add([BY_JUDGE])
    other.rollback()
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
    with pytest.raises(FeedbackError, match=message) as caught:
        Feedback(url)
    assert "s3cret" not in str(caught.value)


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
