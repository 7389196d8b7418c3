"""Receipts, without a server."""

import asyncio
import json

import pytest

from server.receipts import CountsReader, attach_to_stream, sum_by_request


def counts(proposed, accepted, forced=0):
    return {
        "proxy": "a",
        "version": "v1",
        "proposed": proposed,
        "accepted": accepted,
        "rejected": proposed - accepted,
        "forced": forced,
    }


def test_choices_are_summed_by_the_answers_id():
    by_choice = {
        "0_chatcmpl-x-1f2e3d4c": counts(5, 3),
        "1_chatcmpl-x-1f2e3d4c": counts(7, 2, forced=1),
        "chatcmpl-0_y-12345678-00000000": counts(1, 1),
    }
    total = {"version": "v1", "proposed": 12, "accepted": 5, "rejected": 7, "forced": 1}
    summed = sum_by_request(by_choice)
    assert summed["chatcmpl-x"] == total
    assert summed["chatcmpl-0_y-12345678"]["proposed"] == 1


class Engine:
    def __init__(self):
        self.calls = []
        self.fail = False

    async def collective_rpc(self, method, args):
        assert method == "take_alignment_counts"
        self.calls.append(args[0])
        await asyncio.sleep(0.01)
        if self.fail:
            raise RuntimeError("the engine is gone")
        return [{f"{r}-00000000": counts(len(r), 1) for r in args[0] if "plain" not in r}, {}]


def test_requests_that_finish_together_share_a_call():
    async def run():
        engine = Engine()
        reader = CountsReader(engine)
        taken = await asyncio.gather(*(reader.take(f"chatcmpl-{i}") for i in range(20)))
        return engine.calls, taken, await reader.take("chatcmpl-plain")

    calls, taken, plain = asyncio.run(run())
    assert len(calls) <= 3
    assert [entry["proposed"] for entry in taken] == [len(f"chatcmpl-{i}") for i in range(20)]
    assert plain == {}


def test_a_failure_reaches_everyone_who_waits_and_nobody_after():
    async def run():
        engine = Engine()
        reader = CountsReader(engine)
        engine.fail = True
        waiting = [reader.take("chatcmpl-1"), reader.take("chatcmpl-2")]
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        engine.fail = False
        return failed, await reader.take("chatcmpl-3")

    failed, after = asyncio.run(run())
    assert [str(error) for error in failed] == ["the engine is gone"] * 2
    assert after["proposed"] == len("chatcmpl-3")


def test_a_client_that_gives_up_does_not_disturb_the_others():
    async def run():
        reader = CountsReader(Engine())
        gone = asyncio.create_task(reader.take("chatcmpl-1"))
        stays = asyncio.create_task(reader.take("chatcmpl-2"))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(run())["version"] == "v1"


def event(**data):
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def delta(text, finish_reason=None):
    return event(
        id="1",
        model="llm",
        choices=[{"delta": {"content": text}, "finish_reason": finish_reason}],
    )


async def attach(*events):
    async def stream():
        for each in events:
            yield each

    async def make_receipt():
        return {"proxy": "a"}

    attached = attach_to_stream(
        stream(), served_model="llm", asked_model="llm:a", make_receipt=make_receipt
    )
    return [each async for each in attached]


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
def test_the_receipt_is_in_the_last_chunk_only(events):
    *chunks, done = asyncio.run(attach(*events))
    assert done == DONE
    sent = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    expected = [json.loads(chunk.removeprefix("data: ")) for chunk in events[:-1]]
    assert sent == [e | {"model": "llm:a"} for e in expected[:-1]] + [
        expected[-1] | {"model": "llm:a", "alignment": {"proxy": "a"}}
    ]


def test_text_that_looks_like_json_is_left_alone():
    text = '"model":"llm" "finish_reason":"stop" "choices":[]'
    first, *_ = asyncio.run(attach(delta(text, None), delta("", "stop"), DONE))
    assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == text
    assert first.count("llm:a") == 1


def test_a_stream_that_breaks_off_keeps_its_error():
    error = event(error={"message": "no"})
    assert asyncio.run(attach(delta("Hi", None), error, DONE))[1:] == [error, DONE]
