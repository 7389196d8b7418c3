"""Judges on other servers: their files, and what is asked over HTTP, of a server that answers as a test says.

`test_judge_adapters` has an endpoint judge on a real server, and the reward model on vLLM's own.
"""

import asyncio
import json
import logging
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from judge.protocol import Usage
from judge.remote import Chat
from server import remote_client
from server.engine import GracefulHTTPError
from server.remote_client import Meter, connect
from server.remote_judges import RemoteJudge, RemoteJudgeError, read_remote_judges, take_keys

KEY = "sk-of-the-judge"
CHAT = Chat([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}], 5)
REWARD = {"data": [{"probs": [1.5]}], "usage": {"prompt_tokens": 9}}
PAIR_SCORE = {"data": [{"index": 0, "score": -2.5}]}


def completion(*candidates: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, logprob in candidates]
    choice = {"logprobs": {"content": [top[0] | {"top_logprobs": top}]}}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


class Script:
    """What the server answers, one after the other, the last one for ever; and what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.url = list(answers), ""
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.active = self.most_active = 0
        self.left = 0  # connections that were closed before an answer came

    def next(self) -> Any:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def answering(*answers: Any) -> Iterator[Script]:
    """An answer is JSON, bytes, or (status, JSON, headers); None never comes."""
    script, end = Script(*answers), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.requests.append((self.path, self.headers["Authorization"], json.loads(body)))
            script.active += 1
            script.most_active = max(script.active, script.most_active)
            time.sleep(0.01)  # others may come meanwhile
            script.active -= 1
            answer = script.next()
            if answer is None:
                while not end.is_set():
                    readable = select.select([self.connection], [], [], 0.02)[0]
                    if readable and not self.connection.recv(1):
                        script.left += 1
                        break
                self.close_connection = True
                return
            status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        script.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield script
        finally:
            end.set()
            server.shutdown()
            thread.join()


def make(directory: Path, url: str, kind: str, settings: str = "") -> RemoteJudge:
    file = directory / f"{kind}.toml"
    file.write_text(f'kind = "{kind}"\nurl = "{url}"\nmodel = "theirs"\n{settings}\n')
    (judge,) = read_remote_judges([file]).values()
    return judge


def ask(judge: RemoteJudge, chats: int = 1) -> list[tuple[Any, Usage]]:
    begun: list[int] = []
    spent: list[Usage] = []

    async def run() -> list[tuple[Any, Usage]]:
        meter = Meter(begun.extend, spent.append)
        return await connect(judge, KEY, meter)([CHAT] * chats)

    answers = asyncio.run(run())
    assert begun == [CHAT.num_tokens] * chats
    assert sum(usage.prompt_tokens for usage in spent) == sum(u.prompt_tokens for _, u in answers)
    return answers


def fail(judge: RemoteJudge) -> tuple[int, str]:
    with pytest.raises(GracefulHTTPError) as info:
        ask(judge)
    return info.value.http_status, str(info.value)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "FIRST_PAUSE", 0.001)


def test_a_reward_model_is_sent_the_chat(tmp_path: Path) -> None:
    with answering(REWARD) as server:
        judge = make(tmp_path, f"{server.url}/below/", "reward", "[extra_body]\npriority = 1")
        assert ask(judge) == [(1.5, Usage(9, 0))]
    ((path, key, body),) = server.requests
    assert (path, key) == ("/below/classify", f"Bearer {KEY}")
    fields = {"model": "theirs", "priority": 1, "use_activation": False}
    assert body == fields | {"messages": CHAT.messages}


def test_a_reranker_is_sent_two_texts(tmp_path: Path) -> None:
    with answering(PAIR_SCORE) as server:
        judge = make(tmp_path, server.url, "reward", 'api = "score"')
        assert ask(judge) == [(-2.5, Usage())]
    ((path, _, body),) = server.requests
    assert (path, body["text_1"], body["text_2"]) == ("/score", "Hi.", "Hello.")


def test_an_endpoint_is_asked_for_one_token(tmp_path: Path) -> None:
    with answering(completion((" A", -0.25), ("B", -1.5))) as server:
        judge = make(tmp_path, f"{server.url}/v1", "endpoint", "continue_final_message = true")
        assert ask(judge) == [((pytest.approx(-0.25), pytest.approx(-1.5)), Usage(9, 1))]
    ((path, _, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == CHAT.messages and body["continue_final_message"]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)


def test_it_asks_again_after_a_passing_error(tmp_path: Path) -> None:
    busy = (429, {}, {"Retry-After": "0"})
    with answering(busy, (503, {}, {}), REWARD) as server:
        assert ask(make(tmp_path, server.url, "reward"))[0][0] == 1.5
    assert len(server.requests) == 3


def test_a_letter_that_is_not_there_is_a_tie_unless_it_never_is(tmp_path: Path) -> None:
    odd, good = completion(("<think>", -0.1)), completion(("A", -0.1), ("B", -3))
    with answering(good, odd) as server:
        pairs = {pair for pair, _ in ask(make(tmp_path, server.url, "endpoint"), chats=3)}
        assert len(pairs) == 2 and min(pairs)[0] == -float("inf")
        status, message = fail(make(tmp_path, server.url, "endpoint"))
    assert status == 502 and "neither A nor B" in message and "'<think>'" in message


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("reward", {"data": [{"probs": [0.1, 0.9]}]}, "it has 2 classes"),
        ("reward", {"data": [{"probs": [float("nan")]}]}, "the score is nan"),
        ("reward", {"data": []}, "cannot be read"),
        ("reward", ["x"], "cannot be read"),
        ("reward", b"<html>", "is not JSON"),
        ("reward", (307, {}, {"Location": "http://127.0.0.1:1/"}), "HTTP 307"),
        ("reward", (500, {}, {}), "HTTP 500"),
        ("endpoint", {"choices": [{"logprobs": None}]}, "it has no logprobs"),
        ("endpoint", {"choices": []}, "cannot be read"),
    ],
)
def test_what_is_no_answer(tmp_path: Path, kind: str, answer: Any, expected: str) -> None:
    with answering(answer) as server:
        status, message = fail(make(tmp_path, server.url, kind))
    assert status == 502 and message.startswith(f"the {kind} judge ") and expected in message
    assert server.url not in message


def test_an_answer_that_does_not_come(tmp_path: Path) -> None:
    with answering(None) as server:
        status, message = fail(make(tmp_path, server.url, "reward", "timeout = 0.1"))
        assert (status, message) == (504, "the reward judge did not answer within 0.1 s")
    status, message = fail(make(tmp_path, server.url, "reward"))  # which has ended
    assert (status, message) == (502, "the reward judge cannot be reached: ConnectError")


def test_the_key_and_the_address_are_for_the_operator_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = {"error": {"message": f"too long; the key was {KEY}"}}
    caplog.set_level(logging.DEBUG, "server")
    with answering((400, error, {}), (401, error, {})) as server:
        judge = make(tmp_path, server.url, "endpoint")
        asked_too_much, refused = fail(judge), fail(judge)
    assert (
        asked_too_much[1] == "the endpoint judge answered with HTTP 400: too long; the key was ..."
    )
    assert refused[1] == "the endpoint judge answered with HTTP 401"
    assert server.url in caplog.text and "the key was ..." in caplog.text
    assert KEY not in caplog.text


def test_no_more_judgments_at_once_than_allowed(tmp_path: Path) -> None:
    with answering(REWARD) as server:
        ask(make(tmp_path, server.url, "reward", "concurrency = 2"), chats=8)
    assert len(server.requests) == 8 and server.most_active <= 2


def test_who_leaves_cancels_what_is_asked(tmp_path: Path) -> None:
    async def leave(server: Script) -> None:
        judge = make(tmp_path, server.url, "reward", "concurrency = 2")
        meter = Meter(lambda lengths: None, lambda usage: None)
        async with asyncio.timeout(60):
            asked = asyncio.create_task(connect(judge, KEY, meter)([CHAT] * 3))
            while len(server.requests) < 2:
                await asyncio.sleep(0.01)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            while server.left < 2:
                await asyncio.sleep(0.01)

    with answering(None) as server:
        asyncio.run(leave(server))
    assert len(server.requests) == 2  # the third was not sent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kind = "oracle"', "kind: Input tag 'oracle' found using 'kind' does not match"),
        ('url = "http://x"', "kind: Unable to extract tag"),
        ('kind = "reward"\nmodel = "m"', "url: Field required"),
        ('kind = "reward"\nmodel = "m"\nurl = "ftp://x"', "url: URL scheme should be 'http'"),
        ('kind = "reward"\nmodel = "m"\nurl = "http://u:p@x"', "url: Value error, must be an"),
        ('kind = "reward"\nmodel = "m"\nurl = "http://x?k=1"', "url: Value error, must be an"),
        ('kind = "reward"\nmodel = "m"\nurl = "http://x"\nkey = "s"', "key: Extra inputs are not"),
        (
            'kind = "reward"\nmodel = "m"\nurl = "http://x"\ntimeout = 0',
            "timeout: Input should be greater than 0",
        ),
        ("kind = ", "Invalid value"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "judge.toml"
    file.write_text(text)
    with pytest.raises(RemoteJudgeError) as info:
        read_remote_judges([file])
    assert str(info.value).startswith(f"--judge {file}: {message}")


def test_one_judge_of_a_kind_and_its_key(tmp_path: Path) -> None:
    judge = make(tmp_path, "http://127.0.0.1:1", "reward", 'api_key_env = "THEIR_KEY"')
    file = tmp_path / "reward.toml"
    with pytest.raises(RemoteJudgeError, match="there is another judge of kind reward"):
        read_remote_judges([file, file])
    with pytest.raises(RemoteJudgeError, match="no-such-file"):
        read_remote_judges([tmp_path / "no-such-file.toml"])
    environment = {"THEIR_KEY": KEY}
    # Both kinds may have the same one; child processes do not inherit it.
    assert take_keys([judge, judge], environment) == {"THEIR_KEY": KEY}
    assert environment == {}
    with pytest.raises(RemoteJudgeError, match="the environment variable THEIR_KEY is not set"):
        take_keys([judge], environment)
