"""Reading the worker's counts, without a worker."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.alignment_stats import AlignmentCounts, WorkerReader, sum_counts


def counts(proposed, accepted, forced=0):
    return {
        "proxy": "a",
        "version": "v1",
        "proposed": proposed,
        "accepted": accepted,
        "rejected": proposed - accepted,
        "forced": forced,
    }


class Engine:
    """Answers as two ranks do: the second one counts nothing."""

    def __init__(self):
        self.calls = []
        self.fail = False

    async def collective_rpc(self, method, *, args):
        assert method == "take_alignment_counts"
        self.calls.append(args[0])
        await asyncio.sleep(0.01)
        if self.fail:
            raise RuntimeError("the engine is gone")
        return [
            {
                f"{request_id}-00000000": counts(len(request_id), 1)
                for request_id in args[0]
                if "plain" not in request_id
            },
            {},
        ]


def reader(engine):
    return WorkerReader(engine, "take_alignment_counts")


def test_the_engines_ids_are_those_it_was_given():
    """Samples of one request have a number in front; every id gets 8 hex digits behind."""

    class FixedEngine:
        async def collective_rpc(self, method, *, args):
            return [
                {
                    "0_chatcmpl-x-p1-1f2e3d4c": counts(5, 3),
                    "11_chatcmpl-x-p1-1f2e3d4c": counts(7, 2, forced=1),
                    "cmpl-0_y-12345678-p2-00000000": counts(1, 1),
                    "resp_z_0-p3": counts(2, 2),  # where vLLM was told to add nothing
                }
            ]

    async def run():
        worker_reader = reader(FixedEngine())
        samples, other_samples = await asyncio.gather(
            worker_reader.take(["chatcmpl-x-p1"]),
            worker_reader.take(["cmpl-0_y-12345678-p2", "resp_z_0-p3"]),
        )
        return samples, other_samples, await worker_reader.take([])

    samples, other_samples, empty = asyncio.run(run())
    assert set(samples) == {("chatcmpl-x-p1", 0), ("chatcmpl-x-p1", 11)}
    assert sum_counts(samples) == {"proposed": 12, "accepted": 5, "rejected": 7, "forced": 1}
    assert set(other_samples) == {("cmpl-0_y-12345678-p2", 0), ("resp_z_0-p3", 0)}
    assert empty == {}
    assert sum_counts(empty) == {"proposed": 0, "accepted": 0, "rejected": 0, "forced": 0}


def test_requests_that_finish_together_share_a_call():
    async def run():
        engine = Engine()
        shared = reader(engine)
        results = await asyncio.gather(*(shared.take([f"chatcmpl-{i}"]) for i in range(20)))
        return engine.calls, results, await shared.take(["chatcmpl-plain"])

    calls, results, unproxied = asyncio.run(run())
    assert len(calls) <= 3
    for i, result in enumerate(results):
        assert list(result) == [(f"chatcmpl-{i}", 0)]
        assert result[f"chatcmpl-{i}", 0]["proposed"] == len(f"chatcmpl-{i}")
    assert unproxied == {}


@pytest.mark.parametrize("in_response", [False, True])
def test_counts_are_read_once(in_response):
    """As soon as the engine has finished if the response reports them, otherwise only for the log."""

    async def run():
        engine = Engine()
        counts = AlignmentCounts(reader(engine), in_response, engine_ids=["chatcmpl-1", "cmpl-22"])
        counts.finish("chatcmpl-1")
        await asyncio.sleep(0.05)
        early_calls = [*engine.calls]
        return early_calls, await counts.total(), await counts.total(), engine.calls

    early_calls, total, second_total, calls = asyncio.run(run())
    assert early_calls == ([["chatcmpl-1"]] if in_response else [])
    assert total == second_total == {"proposed": 17, "accepted": 2, "rejected": 15, "forced": 0}
    assert sorted(request_id for call in calls for request_id in call) == ["chatcmpl-1", "cmpl-22"]


def test_a_failure_reaches_everyone_who_waits_and_nobody_after():
    async def run():
        engine = Engine()
        shared = reader(engine)
        engine.fail = True
        waiting = [shared.take(["chatcmpl-1"]), shared.take(["chatcmpl-2"])]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        engine.fail = False
        return errors, await shared.take(["chatcmpl-3"])

    errors, result = asyncio.run(run())
    assert [str(error) for error in errors] == ["the engine is gone"] * 2
    assert result["chatcmpl-3", 0]["proposed"] == len("chatcmpl-3")


def test_an_engine_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("server.alignment_stats.CALL_SECONDS", 0.05)

    class SilentEngine:
        async def collective_rpc(self, method, *, args):
            await asyncio.get_running_loop().create_future()

    async def run():
        return await asyncio.wait_for(reader(SilentEngine()).take(["chatcmpl-1"]), 10)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_a_client_that_gives_up_does_not_disturb_the_others():
    async def run():
        shared = reader(Engine())
        cancelled = asyncio.create_task(shared.take(["chatcmpl-1"]))
        remaining = asyncio.create_task(shared.take(["chatcmpl-2"]))
        await asyncio.sleep(0)
        cancelled.cancel()
        return await remaining

    assert list(asyncio.run(run())) == [("chatcmpl-2", 0)]


def test_clients_with_the_same_request_id(http):
    """No client gets another's counts or trace, even if both have chosen the same id."""

    def send(length):
        body = {
            "model": "assent-demo",
            "messages": [{"role": "user", "content": "Hi."}],
            "max_tokens": length,
            "ignore_eos": True,
            "alignment": {"proxy": "aligned", "trace": length % 2 == 0},
        }
        headers = {"X-Request-Id": "the-same"}
        return http.post("/v1/chat/completions", json=body, headers=headers).json()["alignment"]

    lengths = [10, 11, 24, 25, 40, 41]
    with ThreadPoolExecutor(len(lengths)) as pool:
        for length, alignment in zip(lengths, pool.map(send, lengths), strict=True):
            assert alignment["accepted"] + alignment["forced"] == length
            assert [len(trace) for trace in alignment.get("trace", [])] == [length] * (
                length % 2 == 0
            )
