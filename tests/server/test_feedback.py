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
    FeedbackServer,
    metric,
    wait_until,
)
from training import export, prepare

QUESTION = "How do I look after my freezer?"
TURNS = [{"role": "user", "content": QUESTION}]
CALLER = f"key {hashlib.sha256(hashlib.sha256(API_KEY.encode()).digest()).hexdigest()[:16]}"
"""Known by a hash: the key has no name."""


class CallerClients:
    """A caller's clients of a server that stores feedback in a file."""

    def __init__(self, server: FeedbackServer) -> None:
        self.server = server
        headers = {"Authorization": f"Bearer {API_KEY}"}
        self.http = httpx.Client(base_url=server.url, headers=headers, timeout=WAIT_SECONDS)
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)

    def rows(self) -> list[Preference]:
        feedback = Feedback(str(self.server.feedback), create=False)
        try:
            return list(feedback.rows())
        finally:
            feedback.close()


@pytest.fixture(scope="module")
def clients(feedback_server: FeedbackServer) -> Iterator[CallerClients]:
    clients = CallerClients(feedback_server)
    with clients.http, clients.client:
        yield clients


def test_a_choice_between_two_responses(clients: CallerClients) -> None:
    num_before = len(clients.rows())
    body = {"messages": TURNS, "response_a": "x", "response_b": "y", "better": "b"}
    answer = clients.http.post("/feedback", json=body)
    assert (answer.status_code, answer.json()) == (201, {"kept": True})
    assert clients.rows()[num_before:] == [Preference("person", TURNS, "y", "x", caller=CALLER)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_among_the_answers_to_a_request(clients: CallerClients, stream: bool) -> None:
    answer: Any = clients.client.chat.completions.create(
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
    num_before = len(clients.rows())
    response = clients.http.post("/feedback", json={"request_id": request_id, "choice": 1})
    assert response.status_code == 201, response.text
    other_texts = [text for text in dict.fromkeys(texts) if text != texts[1]]
    assert other_texts
    assert clients.rows()[num_before:] == [
        Preference("person", TURNS, texts[1], text, caller=CALLER) for text in other_texts
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
def test_a_choice_among_calls_of_tools(clients: CallerClients, stream: bool) -> None:
    """All samples have an empty text. They are stored with their calls, and the prompt with all of its turns."""
    answer: Any = clients.client.chat.completions.create(
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
    objects = [json.loads(text)["object"] for text in arguments]
    other_names = [name for name in dict.fromkeys(objects) if name != objects[2]]
    assert other_names, "so many samples should differ"
    request_id = chunk.id
    num_before = len(clients.rows())
    response = clients.http.post("/feedback", json={"request_id": request_id, "choice": 2})
    assert response.status_code == 201, response.text
    rows = clients.rows()[num_before:]
    assert {(row.chosen, row.rejected) for row in rows} == {("", "")}
    chosen, rejected = (
        [calls[0]["function"]["arguments"]["object"] for calls in all_calls if calls]
        for all_calls in ([row.chosen_calls for row in rows], [row.rejected_calls for row in rows])
    )
    assert chosen == [objects[2]] * len(other_names) and rejected == other_names
    assert rows[0].prompt == read_messages(WITH_TOOLS)


def test_a_choice_is_its_callers_under_an_id_of_the_servers(clients: CallerClients) -> None:
    """Whatever ids clients choose, none can choose for another or overwrite another's answer."""
    requests = []
    for key in (API_KEY, LIMITED_KEY, API_KEY):
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
        body = {
            "messages": TURNS,
            "n": 2,
            "max_tokens": 16,
            "request_id": "mine",
            "seed": len(requests),
        }
        answer = clients.http.post("/v1/chat/completions", json=body, headers=headers).json()
        requests.append(
            (key, answer["id"], [choice["message"]["content"] for choice in answer["choices"]])
        )
    assert len({request_id for _, request_id, _ in requests}) == 3
    assert not any("mine" in request_id for _, request_id, _ in requests)
    num_before = len(clients.rows())
    for key, request_id, texts in requests:
        for caller in (API_KEY, LIMITED_KEY):
            response = clients.http.post(
                "/feedback",
                json={"request_id": request_id, "choice": 1},
                headers={"Authorization": f"Bearer {caller}"},
            )
            assert response.status_code == (201 if caller == key else 404), response.text
        assert [row.chosen for row in clients.rows()[num_before:]] == [texts[1]]
        num_before += 1


def test_choices_that_are_all_the_same(clients: CallerClients) -> None:
    answer = clients.client.chat.completions.create(
        model="assent-demo", messages=TURNS, max_tokens=4, n=2, extra_body={"top_k": 1}
    )
    rows_before = clients.rows()
    response = clients.http.post("/feedback", json={"request_id": answer.id, "choice": 0})
    assert response.status_code == 400 and "none is better" in response.json()["error"]["message"]
    assert clients.rows() == rows_before


def test_verdicts_are_kept(clients: CallerClients) -> None:
    num_before = len(clients.rows())
    pair = {"response_a": "Go.", "response_b": "To look after your freezer, pull the plug first."}
    verdict = clients.http.post("/judge", json={"prompt": QUESTION, **pair}).json()
    assert verdict["winner"] == "b"
    wait_until(lambda: len(clients.rows()) > num_before)
    (row,) = clients.rows()[num_before:]
    assert row == Preference(
        "judge", TURNS, pair["response_b"], pair["response_a"], None, row.confidence, caller=CALLER
    )
    assert row.confidence == pytest.approx(1 - verdict["probability"])
    assert metric(clients.server.url, 'assent_feedback_rows_total{source="judge"}') >= 1


def test_the_tournaments_verdicts_are_kept_too(clients: CallerClients) -> None:
    num_before = len(clients.rows())
    body = {"prompt": QUESTION, "seed": 1, "strategy": "round-robin"}
    body["responses"] = [
        "Go.",
        "To look after your freezer, pull the plug first.",
        "freezer freezer",
    ]
    record = clients.http.post("/judge/rank", json=body).json()
    num_decided = sum(
        (orders[0] > 0.5) == (orders[1] > 0.5) and orders[0] != 0.5
        for comparison in record["rounds"][0]
        for orders in comparison["orders"].values()
    )
    assert num_decided
    wait_until(lambda: len(clients.rows()) == num_before + num_decided)


def test_what_is_kept_can_be_exported_and_prepared(clients: CallerClients, tmp_path: Path) -> None:
    body = {"messages": WITH_TOOLS, "response_a": "Pull the plug first.", "response_b": "No."}
    assert clients.http.post("/feedback", json={**body, "better": "a"}).status_code == 201
    output = tmp_path / "preferences.jsonl"
    export.main(export.Options(feedback=str(clients.server.feedback), output=output))
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
    ("body", "code", "message"),
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
def test_bad_feedback(
    clients: CallerClients, body: dict[str, object], code: int, message: str
) -> None:
    rows_before = clients.rows()
    content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    answer = clients.http.post("/feedback", content=content, headers=headers)
    assert answer.status_code == answer.json()["error"]["code"] == code
    assert message in answer.json()["error"]["message"]
    assert clients.rows() == rows_before


def test_a_choice_that_there_is_not(clients: CallerClients) -> None:
    answer = clients.client.chat.completions.create(
        model="assent-demo", messages=TURNS, max_tokens=4, n=2
    )
    response = clients.http.post("/feedback", json={"request_id": answer.id, "choice": 2})
    assert response.status_code == 400
    assert "choice 2 is not one of the 2" in response.json()["error"]["message"]


def test_a_locked_database_is_said_and_holds_up_nobody(clients: CallerClients) -> None:
    def num_lost() -> float:
        return metric(clients.server.url, "assent_feedback_lost_total")

    lost_before = num_lost()
    connection = sqlite3.connect(clients.server.feedback)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
        for _ in range(2):
            chat = clients.client.chat.completions.create(
                model="assent-demo", messages=TURNS, max_tokens=4, n=2
            )
            assert chat.choices
        # Both would be lost if the answers waited for the database.
        assert num_lost() < lost_before + 2
        answer = clients.http.post("/feedback", json=body)
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert "database is locked" in answer.json()["error"]["message"]
    finally:
        connection.rollback()
        connection.close()
    assert num_lost() == lost_before + 2  # the chats' choices
    assert clients.http.post("/feedback", json=body).status_code == 201


def test_a_full_disk_is_said_and_ends_nothing(clients: CallerClients) -> None:
    """No file can grow, not even the server's log. Acknowledged rows stay, and the server works again afterwards."""
    body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
    num_before, lost_before = (
        len(clients.rows()),
        metric(clients.server.url, "assent_feedback_lost_total"),
    )
    process = psutil.Process(clients.server.process.pid)
    limits = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
    try:
        response = clients.http.post("/feedback", json=body)
        assert response.status_code == 503 and response.headers["Retry-After"]
        assert "feedback could not be kept" in response.json()["error"]["message"]
        chat = clients.client.chat.completions.create(
            model="assent-demo", messages=TURNS, max_tokens=4, n=2
        )
        assert chat.choices
        wait_until(
            lambda: metric(clients.server.url, "assent_feedback_lost_total") == lost_before + 1
        )
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, limits)
    assert clients.http.post("/feedback", json=body).status_code == 201
    assert len(clients.rows()) == num_before + 1


def test_without_a_database(http: httpx.Client) -> None:
    body = {"prompt": "x", "response_a": "a", "response_b": "b", "better": "a"}
    answer = http.post("/feedback", json=body)
    assert answer.status_code == 403
    assert "start it with --feedback" in answer.json()["error"]["message"]
