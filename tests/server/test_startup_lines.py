"""The last lines of the start-up log: what is served, the page, and a command that works."""

import json
import shlex
import time
from argparse import Namespace

import pytest

from tests.server.conftest import API_KEY, WAIT_SECONDS


def make_lines(host="127.0.0.1", **changes):
    from server.middleware.announce import startup_lines

    args = Namespace(host=host, port=8000, uds=None, ssl_certfile=None, tool_calls="off")
    options = {
        "models": ["llm"],
        "proxies": ["polite"],
        "shadows": [],
        "learned": [],
        "needs_key": False,
        "can_chat": True,
    }
    for name in ("uds", "ssl_certfile"):
        setattr(args, name, changes.pop(name, None))
    return startup_lines(args, **options | changes)


def parse_command(lines):
    """The words of the command, and its body."""
    words = shlex.split(lines[-1].removeprefix("Try: "))
    return words, json.loads(words[words.index("-d") + 1])


def test_all_that_is_served():
    lines = make_lines(models=["llm", "lora"], shadows=["next"], learned=["mine"])
    assert lines[:-1] == [
        "Assent serves on http://127.0.0.1:8000",
        "See it in a browser: http://127.0.0.1:8000/",
        "Models: llm, lora",
        "Proxies: polite (ask for llm:polite)",
        "Shadow proxies, which only score: next",
        "Learned while serving: mine",
        "Tool calls: off",
    ]
    words, body = parse_command(lines)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert body == {"model": "llm:polite", "messages": [{"role": "user", "content": "Hello."}]}


def test_without_proxies_or_a_chat_template():
    lines = make_lines(proxies=[], can_chat=False, needs_key=True)
    assert "--proxy NAME=DIR" in lines[3]
    words, body = parse_command(lines)
    assert words[1].endswith("/v1/completions") and body["model"] == "llm"
    assert "Authorization: Bearer $ASSENT_API_KEY" in words


@pytest.mark.parametrize(
    ("options", "address", "url"),
    [
        ({"host": "0.0.0.0"}, "http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ({"host": None}, "http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ({"host": "::1"}, "http://[::1]:8000", "http://[::1]:8000"),
        ({"ssl_certfile": "x"}, "https://127.0.0.1:8000", "https://127.0.0.1:8000"),
        ({"uds": "/run/a.sock"}, "the socket /run/a.sock", "http://localhost"),
    ],
)
def test_addresses(options, address, url):
    lines = make_lines(**options)
    assert lines[0] == f"Assent serves on {address}"
    assert (lines[1] == f"See it in a browser: {url}/") == ("uds" not in options)
    words, _ = parse_command(lines)
    assert words[1] == f"{url}/v1/chat/completions"
    assert ("--unix-socket" in words) == ("uds" in options)


def test_the_log_of_a_server_ends_with_them(server, client):
    """In the order of a start: after vLLM's own last line, and before the first request."""
    deadline = time.monotonic() + WAIT_SECONDS
    while "Try: curl" not in (log := server.log.read_text(errors="replace")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert log.index("Application startup complete") < log.index("Assent serves on")
    assert f"Assent serves on {server.url}" in log
    assert "Proxies: aligned, polite (ask for assent-demo:aligned, assent-demo:polite)" in log
    (line,) = [line for line in log.splitlines() if "Try: curl" in line]
    _, body = parse_command([line[line.index("Try: ") :]])
    assert client.chat.completions.create(max_tokens=4, **body).model == "assent-demo:aligned"
    assert API_KEY not in line
