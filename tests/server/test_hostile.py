"""Requests that try to exhaust the real server: each is refused soon, and others are answered meanwhile."""

import socket
import threading
from collections import Counter
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.server.conftest import ADMIN_KEY, WAIT_SECONDS, Server

HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
MIB = 2**20


@pytest.fixture
def other_client(server: Server):
    """Another client, which sends requests all the time and gets an answer to each."""
    stopped, statuses = threading.Event(), Counter[int]()

    def poll() -> None:
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
            while not statuses or not stopped.is_set():
                statuses[client.get("/v1/models").status_code] += 1

    thread = threading.Thread(target=poll)
    thread.start()
    yield
    stopped.set()
    thread.join()
    assert set(statuses) == {200}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": [[]] * 50_000 + [0]}),
        ("/v1/responses", {"input": [{}] * 4000}),
        ("/v1/responses", {"input": [{"type": "message"}] * 4000}),
        ("/v1/chat/completions", {"messages": [[]] * 300_000}),
        ("/v1/chat/completions", {"messages": [{}] * 4000}),
        ("/v1/chat/completions", {"messages": [[]] * 4000}),
        ("/v1/chat/completions/batch", {"messages": [[{}] * 4000] * 3}),
        ("/v1/completions", {"prompt": [1.5] * 200_000}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{}] * 4000}], "max_tokens": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_small_body_eats_no_gigabytes(server, other_client, path, body):
    process = psutil.Process(server.process.pid)
    rss_before = process.memory_info().rss
    answer = httpx.post(server.url + path, json=body, headers=HEADERS, timeout=60)
    assert answer.status_code in (400, 422), answer.text[:300]
    assert len(answer.content) < 20_000
    assert process.memory_info().rss - rss_before < 300 * MIB


TURNS = [
    {"role": ("user", "assistant")[i % 2], "content": "Can I open it? " * 15} for i in range(801)
]
LONG_RESPONSE = "You can open it with a fork. " * 2000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/judge", {"messages": TURNS, "response_a": "Yes.", "response_b": "No."}),
        ("/judge", {"prompt": "May I?", "response_a": LONG_RESPONSE, "response_b": LONG_RESPONSE + "!"}),
        (
            "/judge/rank",
            {
                "prompt": "May I?",
                "responses": [f"{i} " + "Yes, you may. " * 50 for i in range(4)],
                "strategy": "round-robin",
            },
        ),
    ],
    ids=["turns", "responses", "ranking"],
)  # fmt: skip
def test_texts_far_beyond_the_context_are_judged(server, other_client, path, body):
    """The first two once ran without an end."""
    answer = httpx.post(server.url + path, json=body, headers=HEADERS, timeout=WAIT_SECONDS)
    assert answer.status_code == 200, answer.text[:300]


def test_headers_without_an_end(server, other_client):
    address = urlsplit(server.url)
    rss_before = psutil.Process(server.process.pid).memory_info().rss
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(3000):
                connection.sendall(b"a: " + b"b" * 10_000 + b"\r\n")
    assert psutil.Process(server.process.pid).memory_info().rss - rss_before < 50 * MIB
