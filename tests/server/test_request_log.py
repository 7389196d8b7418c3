"""One line for every request: its kind and its cost, without its texts."""

import asyncio
import json
import time
import uuid
from contextlib import suppress

import httpx
import pytest

from tests.server.conftest import API_KEY, LIMITED_KEY, WAIT_SECONDS

SECRET = "Can I open my kettle with a fork?"


def lines_of(server, mark=None):
    lines = []
    for text in server.log.read_text(errors="replace").splitlines():
        if text.startswith('{"time": '):
            line = json.loads(text)
            if mark is None or mark in json.dumps(line):
                lines.append(line)
    return lines


def line_of(server, mark):
    """The line of the one request that has the mark in its id or path."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if lines := lines_of(server, mark):
            (line,) = lines
            return line
        time.sleep(0.05)
    pytest.fail(f"no line of {mark}: {server.log_tail()}")


def send(server, body, *, route="/v1/chat/completions", key=API_KEY, mark=None, **options):
    mark = mark or uuid.uuid4().hex
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": mark}
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 8} | body
    answer = httpx.post(
        server.url + route, json=body, headers=headers, timeout=WAIT_SECONDS, **options
    )
    return answer, line_of(server, mark)


@pytest.mark.parametrize("stream", [False, True])
def test_an_aligned_request(server, stream):
    answer, line = send(
        server, {"model": "assent-demo:aligned", "stream": stream, "ignore_eos": True}
    )
    version = answer.headers["Assent-Proxy"]
    assert line["proxy"] == version and version.startswith("aligned@")
    assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")
    assert (line["status"], line["complete"]) == (200, True)
    assert (line["caller"], line["model"]) == ("--api-key 1", "assent-demo:aligned")
    assert line["tokens"]["completion"] == 8 and line["tokens"]["prompt"] > 8
    counts = line["proxy_counts"]
    assert counts["accepted"] + counts["forced"] == 8
    assert counts["proposed"] == counts["accepted"] + counts["rejected"]
    assert 0 < line["first_byte_seconds"] <= line["seconds"]
    assert "kettle" not in server.log.read_text(errors="replace")


def test_the_counts_are_those_of_the_answer(server):
    answer, line = send(server, {"model": "assent-demo", "alignment": {"proxy": "polite"}, "n": 2})
    alignment = answer.json()["alignment"]
    assert line["proxy_counts"] == {key: alignment[key] for key in line["proxy_counts"]}
    assert line["tokens"]["completion"] == answer.json()["usage"]["completion_tokens"]


def test_a_plain_and_a_best_of_request(server):
    answer, line = send(server, {"model": "assent-demo", "alignment": {"best_of": 3}})
    usage = answer.json()["usage"]
    tokens = line["tokens"]
    assert line["best_of"] == 3 and "proxy" not in line
    judged = tokens.get("judge_completion", 0)  # equal samples are not judged
    assert tokens["completion"] + judged == usage["completion_tokens"]
    assert tokens["prompt"] // 3 + tokens.get("judge_prompt", 0) == usage["prompt_tokens"]


def test_who_is_turned_away(server):
    mark = uuid.uuid4().hex
    httpx.post(f"{server.url}/v1/{mark}")
    line = line_of(server, mark)
    assert line["status"] == 401 and "caller" not in line
    mark = uuid.uuid4().hex
    headers = {"Authorization": f"Bearer {LIMITED_KEY}"}
    httpx.post(f"{server.url}/proxies/{mark}", headers=headers)
    line = line_of(server, mark)
    assert (line["status"], line["caller"]) == (403, "limited")


async def send_and_cancel(url, body, mark):
    """Disconnect as soon as the request is in flight."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    proxies = url.replace("/v1/chat/completions", "/proxies")
    async with httpx.AsyncClient(headers=headers, timeout=WAIT_SECONDS) as client:
        task = asyncio.create_task(client.post(url, json=body, headers={"X-Request-Id": mark}))
        in_flight = 0
        while not in_flight:
            data = (await client.get(proxies)).json()["data"]
            in_flight = sum(proxy["in_flight"] for proxy in data)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_a_client_that_goes(server, http):
    def num_cancelled():
        text = http.get("/metrics").text
        name = 'assent_requests_cancelled_total{path="/v1/chat/completions"}'
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    cancelled_before, mark = num_cancelled(), uuid.uuid4().hex
    body = {
        "model": "assent-demo:aligned",
        "messages": [{"role": "user", "content": "Hi."}],
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {API_KEY}", "X-Request-Id": mark}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers) as answer:
        next(answer.iter_lines())
    line = line_of(server, mark)
    assert line["complete"] is False and line["tokens"]["completion"] < 900
    for samples in (1, 4):
        mark = uuid.uuid4().hex
        options = {"stream": False, "alignment": {"best_of": samples}}
        asyncio.run(send_and_cancel(url, body | options, mark))
        line = line_of(server, mark)
        assert line["complete"] is False and line["status"] is None
        tokens = line["proxy_counts"]["accepted"] + line["proxy_counts"]["forced"]
        assert tokens < samples * 900  # none of them went on to its end
    assert num_cancelled() == cancelled_before + 3


def test_health_and_metrics_leave_no_line(server, http):
    assert http.get("/metrics").status_code == http.get("/health").status_code == 200
    _, line = send(server, {"model": "assent-demo"})  # written after any line of theirs
    assert line["status"] == 200
    assert not {logged["path"] for logged in lines_of(server)} & {"/metrics", "/health"}


def test_texts_where_they_are_asked_for(feedback_server):
    answer, line = send(feedback_server, {"model": "assent-demo", "n": 2, "seed": 3})
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert line["completions"] == texts
    assert line["request"]["messages"][0]["content"] == SECRET
    assert line["caller"] == "--api-key 1"
