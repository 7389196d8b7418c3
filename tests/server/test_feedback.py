"""People's choices and the judge's verdicts over HTTP, kept in SQLite, and exported."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from judge.feedback import Feedback, Preference
from judge.messages import read_messages
from tests.server.conftest import (
    API_KEY,
    DEMO,
    LIMITED_KEY,
    WAIT_SECONDS,
    Keeping,
    metric,
    wait_until,
)
from training import export, prepare

QUESTION = "How do I look after my freezer?"
TURNS = [{"role": "user", "content": QUESTION}]
CALLER = f"key {hashlib.sha256(hashlib.sha256(API_KEY.encode()).digest()).hexdigest()[:16]}"
"""Known by a hash: the key has no name."""


class Clients:
    """A caller's, of a server that keeps feedback in a file."""

    def __init__(self, running: Keeping) -> None:
        self.running = running
        headers = {"Authorization": f"Bearer {API_KEY}"}
        self.http = httpx.Client(base_url=running.url, headers=headers, timeout=WAIT_SECONDS)
        self.client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=API_KEY, max_retries=0)

    def rows(self) -> list[Preference]:
        feedback = Feedback(str(self.running.feedback), create=False)
        try:
            return list(feedback.rows())
        finally:
            feedback.close()


@pytest.fixture(scope="module")
def keeping(keeping_server: Keeping) -> Iterator[Clients]:
    clients = Clients(keeping_server)
    with clients.http, clients.client:
        yield clients


def test_a_choice_between_two_responses(keeping: Clients) -> None:
    before = len(keeping.rows())
    body = {"messages": TURNS, "response_a": "x", "response_b": "y", "better": "b"}
    answer = keeping.http.post("/feedback", json=body)
    assert (answer.status_code, answer.json()) == (201, {"kept": True})
    assert keeping.rows()[before:] == [Preference("person", TURNS, "y", "x", caller=CALLER)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_among_the_answers_to_a_request(keeping: Clients, stream: bool) -> None:
    answer: Any = keeping.client.chat.completions.create(
        model="assent-demo", messages=TURNS, max_tokens=24, n=3, seed=1, stream=stream
    )
    if stream:
        texts, request_id = ["", "", ""], ""
        for chunk in answer:
            request_id = chunk.id
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts, request_id = [choice.message.content for choice in answer.choices], answer.id
    before = len(keeping.rows())
    given = keeping.http.post("/feedback", json={"request_id": request_id, "choice": 1})
    assert given.status_code == 201, given.text
    others = [text for text in dict.fromkeys(texts) if text != texts[1]]
    assert others
    assert keeping.rows()[before:] == [
        Preference("person", TURNS, texts[1], text, caller=CALLER) for text in others
    ]


CALL = r'<tool_call>\{"name": "note", "arguments": \{"object": "[a-f]"\}\}</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "note", "parameters": {}}}]
WITH_TOOLS: Any = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "note", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "call-1", "content": "noted"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_among_calls_of_tools(keeping: Clients, stream: bool) -> None:
    """All have the same text, none, and are kept with what differs; the prompt with all of its turns."""
    answer: Any = keeping.client.chat.completions.create(
        model="assent-demo", messages=WITH_TOOLS, tools=TOOLS, max_tokens=160, n=8, seed=1, stream=stream,
        temperature=2.0,
        extra_body={"structured_outputs": {"regex": CALL}},
    )  # fmt: skip
    arguments = [""] * 8
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            message = choice.delta if stream else choice.message
            assert not message.content
            for call in message.tool_calls or ():
                arguments[choice.index] += call.function.arguments or ""
    objects = [json.loads(each)["object"] for each in arguments]
    others = [each for each in dict.fromkeys(objects) if each != objects[2]]
    assert others, "so many samples should differ"
    request_id = chunk.id
    before = len(keeping.rows())
    given = keeping.http.post("/feedback", json={"request_id": request_id, "choice": 2})
    assert given.status_code == 201, given.text
    rows = keeping.rows()[before:]
    assert {(row.chosen, row.rejected) for row in rows} == {("", "")}
    chosen, rejected = (
        [calls[0]["function"]["arguments"]["object"] for calls in side if calls]
        for side in ([r.chosen_calls for r in rows], [r.rejected_calls for r in rows])
    )
    assert chosen == [objects[2]] * len(others) and rejected == others
    assert rows[0].prompt == read_messages(WITH_TOOLS)


def test_a_choice_is_its_callers_under_an_id_of_the_servers(keeping: Clients) -> None:
    """Whatever ids clients choose, nobody chooses for another, or has another's answer overwritten."""
    ids = []
    for key in (API_KEY, LIMITED_KEY, API_KEY):
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
        body = {"messages": TURNS, "n": 2, "max_tokens": 16, "request_id": "mine", "seed": len(ids)}
        answer = keeping.http.post("/v1/chat/completions", json=body, headers=headers).json()
        ids.append((key, answer["id"], [each["message"]["content"] for each in answer["choices"]]))
    assert len({request_id for _, request_id, _ in ids}) == 3
    assert not any("mine" in request_id for _, request_id, _ in ids)
    before = len(keeping.rows())
    for key, request_id, texts in ids:
        for caller in (API_KEY, LIMITED_KEY):
            given = keeping.http.post(
                "/feedback",
                json={"request_id": request_id, "choice": 1},
                headers={"Authorization": f"Bearer {caller}"},
            )
            assert given.status_code == (201 if caller == key else 404), given.text
        assert [row.chosen for row in keeping.rows()[before:]] == [texts[1]]
        before += 1


def test_choices_that_are_all_the_same(keeping: Clients) -> None:
    answer = keeping.client.chat.completions.create(
        model="assent-demo", messages=TURNS, max_tokens=4, n=2, extra_body={"top_k": 1}
    )
    before = keeping.rows()
    given = keeping.http.post("/feedback", json={"request_id": answer.id, "choice": 0})
    assert given.status_code == 400 and "none is better" in given.json()["error"]["message"]
    assert keeping.rows() == before


def test_verdicts_are_kept(keeping: Clients) -> None:
    before = len(keeping.rows())
    pair = {"response_a": "Go.", "response_b": "To look after your freezer, pull the plug first."}
    verdict = keeping.http.post("/judge", json={"prompt": QUESTION, **pair}).json()
    assert verdict["winner"] == "b"
    wait_until(lambda: len(keeping.rows()) > before)
    (row,) = keeping.rows()[before:]
    assert row == Preference(
        "judge", TURNS, pair["response_b"], pair["response_a"], None, row.confidence, caller=CALLER
    )
    assert row.confidence == pytest.approx(1 - verdict["probability"])
    assert metric(keeping.running.url, 'assent_feedback_rows_total{source="judge"}') >= 1


def test_the_tournaments_verdicts_are_kept_too(keeping: Clients) -> None:
    before = len(keeping.rows())
    body = {"prompt": QUESTION, "seed": 1, "strategy": "round-robin"}
    body["responses"] = [
        "Go.",
        "To look after your freezer, pull the plug first.",
        "freezer freezer",
    ]
    receipt = keeping.http.post("/judge/rank", json=body).json()
    decided = sum(
        (orders[0] > 0.5) == (orders[1] > 0.5) and orders[0] != 0.5
        for comparison in receipt["rounds"][0]
        for orders in comparison["orders"].values()
    )
    assert decided
    wait_until(lambda: len(keeping.rows()) == before + decided)


def test_what_is_kept_can_be_exported_and_prepared(keeping: Clients, tmp_path: Path) -> None:
    body = {"messages": WITH_TOOLS, "response_a": "Pull the plug first.", "response_b": "No."}
    assert keeping.http.post("/feedback", json={**body, "better": "a"}).status_code == 201
    output = tmp_path / "preferences.jsonl"
    export.main(export.Options(feedback=str(keeping.running.feedback), output=output))
    prepare.main(
        prepare.Options(
            model=str(DEMO / "model"),
            preferences=str(output),
            output=tmp_path / "data",
            held_out=0,
            strict=True,
        )
    )
    exported = output.read_text().splitlines()
    assert len(exported) >= 3
    prepared = (tmp_path / "data/train.jsonl").read_text()
    assert prepared.count("\n") == len(exported) and '"tool_calls"' in prepared


PREFERS_A = {"response_a": "a", "response_b": "b", "better": "a"}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({}, 400, "either prompt or messages"),
        ({"prompt": "x", "response_a": "a", "response_b": "b"}, 400, "better"),
        ({"prompt": "x", "response_a": "a", "response_b": "a", "better": "a"}, 400, "the same"),
        ({"request_id": "chatcmpl-1"}, 400, "with request_id give choice"),
        (
            {"request_id": "chatcmpl-1", "choice": 0},
            404,
            "no answer is known by the id 'chatcmpl-1'",
        ),
        ({"request_id": "x", "choice": 0, "prompt": "y"}, 400, "nothing else"),
        ({"choice": 0}, 400, "choice needs request_id"),
        ({"request_id": "x", "choice": -1}, 400, "choice"),
        ({"prompt": "x", "response_a": "a", "response_b": "b", "better": "c"}, 400, "better"),
        ({"prompt": "\ud83d", **PREFERS_A}, 400, "half of a surrogate pair"),
        ({"prompt": "x", **PREFERS_A, "response_b": "\ud83d"}, 400, "half of a surrogate pair"),
        ({"request_id": "\ud83d", "choice": 0}, 400, "half of a surrogate pair"),
        ({"prompt": "x", **PREFERS_A, "response_a": " "}, 400, "the chosen answer is empty"),
        ({"prompt": " ", **PREFERS_A}, 400, "the prompt is empty"),
        ({"messages": [], **PREFERS_A}, 400, "expected a list of chat messages"),
        ({"messages": [{"role": "robot", "content": "x"}], **PREFERS_A}, 400, "role 'robot'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], **PREFERS_A},
            400,
            "not text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], **PREFERS_A},
            400,
            "assistant's turn",
        ),
    ],
)
def test_bad_feedback(keeping: Clients, body: dict[str, object], code: int, said: str) -> None:
    before = keeping.rows()
    content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    answer = keeping.http.post("/feedback", content=content, headers=headers)
    assert answer.status_code == answer.json()["error"]["code"] == code
    assert said in answer.json()["error"]["message"]
    assert keeping.rows() == before


def test_a_choice_that_there_is_not(keeping: Clients) -> None:
    answer = keeping.client.chat.completions.create(
        model="assent-demo", messages=TURNS, max_tokens=4, n=2
    )
    given = keeping.http.post("/feedback", json={"request_id": answer.id, "choice": 2})
    assert given.status_code == 400
    assert "choice 2 is not one of the 2" in given.json()["error"]["message"]


def test_a_locked_database_is_said_and_holds_up_nobody(keeping: Clients) -> None:
    def lost() -> float:
        return metric(keeping.running.url, "assent_feedback_lost_total")

    before = lost()
    other = sqlite3.connect(keeping.running.feedback)
    other.execute("BEGIN EXCLUSIVE")
    try:
        body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
        for _ in range(2):
            chat = keeping.client.chat.completions.create(
                model="assent-demo", messages=TURNS, max_tokens=4, n=2
            )
            assert chat.choices
        assert lost() < before + 2  # both would be, had the answers waited for the database
        answer = keeping.http.post("/feedback", json=body)
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert "database is locked" in answer.json()["error"]["message"]
    finally:
        other.rollback()
        other.close()
    assert lost() == before + 2  # the chats' choices
    assert keeping.http.post("/feedback", json=body).status_code == 201


def test_a_full_disk_is_said_and_ends_nothing(keeping: Clients) -> None:
    """No file may grow, the server's log among them; what was acknowledged stays, and all goes on after."""
    body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
    before, lost = len(keeping.rows()), metric(keeping.running.url, "assent_feedback_lost_total")
    process = psutil.Process(keeping.running.process.pid)
    usual = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, usual[1]))
    try:
        refused = keeping.http.post("/feedback", json=body)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert "feedback could not be kept" in refused.json()["error"]["message"]
        chat = keeping.client.chat.completions.create(
            model="assent-demo", messages=TURNS, max_tokens=4, n=2
        )
        assert chat.choices
        wait_until(lambda: metric(keeping.running.url, "assent_feedback_lost_total") == lost + 1)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, usual)
    assert keeping.http.post("/feedback", json=body).status_code == 201
    assert len(keeping.rows()) == before + 1


def test_without_a_database(http: httpx.Client) -> None:
    body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
    answer = http.post("/feedback", json=body)
    assert answer.status_code == 403
    assert "start it with --feedback" in answer.json()["error"]["message"]
