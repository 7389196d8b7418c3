"""Server-sent events with our fields, without a server."""

import asyncio
import json

import pytest

from server.streams import attach_to_stream


def event(**data):
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def delta(text, finish_reason=None):
    return event(
        id="1",
        model="llm",
        choices=[{"delta": {"content": text}, "finish_reason": finish_reason}],
    )


async def attach(*events, traces=None):
    async def stream():
        for line in events:
            yield line

    async def make_stats():
        return STATS

    async def next_trace():
        return traces.pop(0)

    trace = None if traces is None else next_trace
    attached = attach_to_stream(stream(), opening=OPENING, make_stats=make_stats, trace=trace)
    return [chunk async for chunk in attached]


def parse_events(events):
    return [json.loads(line.removeprefix("data: ")) for line in events]


OPENING = {"proxy": "a", "version": "1"}
STATS = OPENING | {"proposed": 3}
USAGE = event(id="1", model="llm", choices=[], usage={"total_tokens": 2})
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "events",
    [
        [delta("Hi", None), delta("", "stop"), DONE],
        [delta("Hi", None), delta("", "stop"), USAGE, DONE],
        [delta("Hi", "stop"), delta("Ho", None), delta("", "length"), DONE],
    ],
)
def test_the_first_chunk_names_the_proxy_and_the_last_one_has_the_counts(events):
    *chunks, last_line = asyncio.run(attach(*events))
    assert last_line == DONE
    first, *middle, last = parse_events(events[:-1])
    expected = [first | {"alignment": OPENING}, *middle, last | {"alignment": STATS}]
    assert parse_events(chunks) == expected
    assert len({chunk["id"] for chunk in parse_events(chunks)}) == 1


def test_a_single_chunk_has_both():
    chunk, _ = asyncio.run(attach(delta("Hi", "stop"), DONE))
    assert parse_events([chunk])[0]["alignment"] == STATS


def test_a_trace_goes_with_the_chunks():
    """A chunk without new entries has no trace; entries that come after the last chunk's own are added to it."""
    events = [delta("a"), delta("b"), delta("c", "stop"), DONE]
    *chunks, _ = asyncio.run(attach(*events, traces=[["1"], [], ["2", "3"], ["4"]]))
    assert [chunk.get("alignment") for chunk in parse_events(chunks)] == [
        OPENING | {"trace": ["1"]},
        None,
        STATS | {"trace": ["2", "3", "4"]},
    ]


def test_text_that_looks_like_json_is_left_alone():
    text = '"finish_reason":"stop" "choices":[]'
    first, *_ = asyncio.run(attach(delta(text, None), delta("", "stop"), DONE))
    assert parse_events([first])[0]["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize("traces", [None, [[], [], []]])
def test_a_stream_that_breaks_off_keeps_its_error(traces):
    error = event(error={"message": "no"})
    assert asyncio.run(attach(delta("Hi", None), error, DONE, traces=traces))[1:] == [error, DONE]
