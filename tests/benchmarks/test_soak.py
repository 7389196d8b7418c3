"""A soak notices errors. The server's part is in tests/server."""

import asyncio
import random
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest

from benchmarks.soak.__main__ import Sample, trend
from benchmarks.soak.crowd import Crowd
from benchmarks.soak.requests import Question, read_stream


class Reply:
    """A streamed response that consists of the given lines."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    @property
    async def content(self) -> AsyncIterator[bytes]:
        for line in self.lines:
            yield f"{line}\n".encode()


def data_line(text: str) -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}'


def test_a_stream() -> None:
    def read(*lines: str, chunks: int | None = None) -> str:
        reply: Any = Reply(*lines)
        return asyncio.run(read_stream(reply, chunks))

    done_line = "data: [DONE]"
    assert read(data_line("a"), "", data_line("b"), 'data: {"choices": []}', done_line) == "ab"
    assert read(data_line("a"), data_line("b"), data_line("c"), chunks=2) == "ab"
    with pytest.raises(RuntimeError, match="before its end"):
        read(data_line("a"))
    with pytest.raises(RuntimeError, match="died"):
        read(data_line("a"), 'data: {"error": "died"}', done_line)


def test_another_answer_than_the_quiet_one_is_wrong() -> None:
    question = Question("chat", "Why?")
    client: Any = None
    crowd = Crowd(client, [question], {(question, "v1"): "So.", (question, "v2"): "Thus."})
    for version in ("v1", "v2"):
        crowd._compare("chat", question, version, "So.", 0.1)
    assert crowd.record.outcomes["chat"] == {"right": 1, "wrong": 1}
    assert "v2" in crowd.record.details[0] and "not 'Thus.'" in crowd.record.details[0]


def test_nobody_answers() -> None:
    """A request that fails is counted as lost."""

    class UnreachableClient:
        def post(self, *_: object, **__: object) -> None:
            raise ConnectionError("nobody there")

    async def run() -> Any:
        client: Any = UnreachableClient()
        crowd = Crowd(client, [Question("chat", "Why?")], {})
        await crowd.client(random.Random(0), monotonic() + 1)
        return crowd.record

    record = asyncio.run(run())
    assert {outcome for counts in record.outcomes.values() for outcome in counts} == {"lost"}
    assert "nobody there" in record.details[0]


def test_a_leak_has_a_slope() -> None:
    samples = [Sample(i / 12, 100 + i * 0.5, 40, 7) for i in range(120)]
    result = trend(samples, "megabytes")
    assert result["slope"] == pytest.approx(6.0) and result["standard_error"] < 1e-6
    assert (result["first"], result["last"]) == (130, 159.5)
    assert trend(samples, "files")["slope"] == 0
