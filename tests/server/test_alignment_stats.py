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
        return [{f"{r}-00000000": counts(len(r), 1) for r in args[0] if "plain" not in r}, {}]


def reader(engine):
    return WorkerReader(engine, "take_alignment_counts")


def test_the_engines_ids_are_those_it_was_given():
    """Samples of one request have a number in front; every id gets 8 hex digits behind."""

    class Fixed:
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
        taken = reader(Fixed())
        x, others = await asyncio.gather(
            taken.take(["chatcmpl-x-p1"]), taken.take(["cmpl-0_y-12345678-p2", "resp_z_0-p3"])
        )
        return x, others, await taken.take([])

    x, others, none = asyncio.run(run())
    assert set(x) == {("chatcmpl-x-p1", 0), ("chatcmpl-x-p1", 11)}
    assert sum_counts(x) == {"proposed": 12, "accepted": 5, "rejected": 7, "forced": 1}
    assert set(others) == {("cmpl-0_y-12345678-p2", 0), ("resp_z_0-p3", 0)}
    assert none == {}
    assert sum_counts(none) == {"proposed": 0, "accepted": 0, "rejected": 0, "forced": 0}


def test_requests_that_finish_together_share_a_call():
    async def run():
        engine = Engine()
        shared = reader(engine)
        taken = await asyncio.gather(*(shared.take([f"chatcmpl-{i}"]) for i in range(20)))
        return engine.calls, taken, await shared.take(["chatcmpl-plain"])

    calls, taken, plain = asyncio.run(run())
    assert len(calls) <= 3
    for i, found in enumerate(taken):
        assert list(found) == [(f"chatcmpl-{i}", 0)]
        assert found[f"chatcmpl-{i}", 0]["proposed"] == len(f"chatcmpl-{i}")
    assert plain == {}


@pytest.mark.parametrize("in_response", [False, True])
def test_counts_are_read_once(in_response):
    """As soon as the engine has finished, where the response reports them; else for the log alone."""

    async def run():
        engine = Engine()
        counts = AlignmentCounts(reader(engine), in_response, engine_ids=["chatcmpl-1", "cmpl-22"])
        counts.finish("chatcmpl-1")
        await asyncio.sleep(0.05)
        before = [*engine.calls]
        return before, await counts.total(), await counts.total(), engine.calls

    before, total, again, calls = asyncio.run(run())
    assert before == ([["chatcmpl-1"]] if in_response else [])
    assert total == again == {"proposed": 17, "accepted": 2, "rejected": 15, "forced": 0}
    assert sorted(request_id for call in calls for request_id in call) == ["chatcmpl-1", "cmpl-22"]


def test_a_failure_reaches_everyone_who_waits_and_nobody_after():
    async def run():
        engine = Engine()
        shared = reader(engine)
        engine.fail = True
        waiting = [shared.take(["chatcmpl-1"]), shared.take(["chatcmpl-2"])]
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        engine.fail = False
        return failed, await shared.take(["chatcmpl-3"])

    failed, after = asyncio.run(run())
    assert [str(error) for error in failed] == ["the engine is gone"] * 2
    assert after["chatcmpl-3", 0]["proposed"] == len("chatcmpl-3")


def test_an_engine_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr("server.alignment_stats.CALL_SECONDS", 0.05)

    class Gone:
        async def collective_rpc(self, method, *, args):
            await asyncio.get_running_loop().create_future()

    async def run():
        return await asyncio.wait_for(reader(Gone()).take(["chatcmpl-1"]), 10)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_a_client_that_gives_up_does_not_disturb_the_others():
    async def run():
        shared = reader(Engine())
        gone = asyncio.create_task(shared.take(["chatcmpl-1"]))
        stays = asyncio.create_task(shared.take(["chatcmpl-2"]))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert list(asyncio.run(run())) == [("chatcmpl-2", 0)]


def test_clients_with_the_same_request_id(http):
    """Nobody gets another's counts or trace, not even of an id that both have chosen."""

    def ask(tokens):
        body = {
            "model": "assent-demo",
            "messages": [{"role": "user", "content": "Hi."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "alignment": {"proxy": "aligned", "trace": tokens % 2 == 0},
        }
        headers = {"X-Request-Id": "the-same"}
        return http.post("/v1/chat/completions", json=body, headers=headers).json()["alignment"]

    sizes = [10, 11, 24, 25, 40, 41]
    with ThreadPoolExecutor(len(sizes)) as pool:
        for tokens, found in zip(sizes, pool.map(ask, sizes), strict=True):
            assert found["accepted"] + found["forced"] == tokens
            assert [len(trace) for trace in found.get("trace", [])] == [tokens] * (tokens % 2 == 0)
