"""That a soak sees what goes wrong; the server's part is in tests/server."""

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
    """A streamed answer, as far as it goes."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    @property
    async def content(self) -> AsyncIterator[bytes]:
        for line in self.lines:
            yield f"{line}\n".encode()


def piece(text: str) -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}'


def test_a_stream() -> None:
    def read(*lines: str, chunks: int | None = None) -> str:
        reply: Any = Reply(*lines)
        return asyncio.run(read_stream(reply, chunks))

    done = "data: [DONE]"
    assert read(piece("a"), "", piece("b"), 'data: {"choices": []}', done) == "ab"
    assert read(piece("a"), piece("b"), piece("c"), chunks=2) == "ab"
    with pytest.raises(RuntimeError, match="before its end"):
        read(piece("a"))
    with pytest.raises(RuntimeError, match="died"):
        read(piece("a"), 'data: {"error": "died"}', done)


def test_another_answer_than_the_quiet_one_is_wrong() -> None:
    question = Question("chat", "Why?")
    nobody: Any = None
    crowd = Crowd(nobody, [question], {(question, "v1"): "So.", (question, "v2"): "Thus."})
    for version in ("v1", "v2"):
        crowd._compare("chat", question, version, "So.", 0.1)
    assert crowd.record.outcomes["chat"] == {"right": 1, "wrong": 1}
    assert "v2" in crowd.record.details[0] and "not 'Thus.'" in crowd.record.details[0]


def test_nobody_answers() -> None:
    """Whatever fails on the way is counted as lost."""

    class Nobody:
        def post(self, *_: object, **__: object) -> None:
            raise ConnectionError("nobody there")

    async def run() -> Any:
        nobody: Any = Nobody()
        crowd = Crowd(nobody, [Question("chat", "Why?")], {})
        await crowd.client(random.Random(0), monotonic() + 1)
        return crowd.record

    record = asyncio.run(run())
    assert {outcome for each in record.outcomes.values() for outcome in each} == {"lost"}
    assert "nobody there" in record.details[0]


def test_a_leak_has_a_slope() -> None:
    samples = [Sample(i / 12, 100 + i * 0.5, 40, 7) for i in range(120)]
    found = trend(samples, "megabytes")
    assert found["slope"] == pytest.approx(6.0) and found["standard_error"] < 1e-6
    assert (found["first"], found["last"]) == (130, 159.5)
    assert trend(samples, "files")["slope"] == 0
