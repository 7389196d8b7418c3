"""Assignments and counts, without an engine."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxy.acceptance import Decision
from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import BatchPlan
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.request_tracker import Batch, RequestTracker
from proxy.noise import noise_key
from tests.proxy.proxies import add_proxy, random_network

EOS = 1


def params(proxy: str | None, **alignment: Any) -> Any:
    """The fields of vLLM's SamplingParams that the tracker reads."""
    fields = {
        "stop_token_ids": [],
        "eos_token_id": EOS,
        "seed": None,
        "temperature": 1.0,
    }
    fields |= {key: alignment.pop(key) for key in tuple(alignment) if key in fields}
    alignment_args = {"alignment": alignment | {"proxy": proxy}} if proxy or alignment else None
    return SimpleNamespace(extra_args=alignment_args, **fields)


class Worker:
    """A worker's current requests, its proxies, and its tracker."""

    def __init__(self, **kwargs: Any) -> None:
        self.tracker = RequestTracker(torch.device("cpu"), **kwargs)
        self.requests: dict[str, Any] = {}
        self.pool = ProxyPool()
        self.proxies: dict[tuple[str, str | None], ServedProxy] = {}
        for name in ("a", "b"):
            self.load(name)

    def load(self, name: str, version: str = "v1") -> ServedProxy:
        proxy = add_proxy(self.pool, name, random_network(1, max_rejections=5), version).served
        self.proxies[name, None] = self.proxies[name, version] = proxy
        return proxy

    def plan(
        self, batch: list[str] | None = None, *, shadows: Sequence[ServedProxy] = ()
    ) -> BatchPlan:
        engine_batch = Batch(
            req_ids=list(self.requests) if batch is None else batch,
            params_of=self.requests.__getitem__,
            live=self.requests.keys(),
        )
        get_proxy = self.proxies.get
        return self.tracker.plan_of(engine_batch.req_ids) or self.tracker.plan(
            engine_batch, self.pool, lambda *key: get_proxy(key), shadows=shadows
        )

    def assignments(self) -> list[Assignment]:
        """The assignments of all requests that a proxy decides."""
        rows = self.plan().proxied
        return [] if rows is None else rows.assignments

    def step(
        self,
        tokens: dict[str, int] | None = None,
        proposed: int = 3,
        forced: bool = False,
        discarded: set[str] = frozenset(),  # type: ignore[assignment]
        plan: BatchPlan | None = None,
    ) -> None:
        """Record the same decision for every row; token 7 by default."""
        rows = (plan or self.plan()).proxied
        if rows is None:
            return
        ids = [assignment.req_id for assignment in rows.assignments]
        token_ids = [(tokens or {}).get(req_id, 7) for req_id in ids]
        count = len(ids)
        decision = Decision(
            torch.tensor([[0] * count, token_ids, [proposed] * count, [forced] * count])
        )
        mask = torch.tensor([req_id in discarded for req_id in ids])
        self.tracker.stats.record(rows, decision, mask)


def test_what_each_request_gets():
    worker = Worker()
    worker.requests = {
        "r0": params("a", strength=2.0, temperature=0.0),
        "r1": params(None),
        "r2": params("b", max_rejections=0, trace=True, stop_token_ids=[8, 9]),
        "r3": params("a", seed=-5, shadow=False),
        "r4": params("unknown"),
        "r5": params("b", strength=0),
        "r6": params("a", version="v1"),
        "r7": params("a", version="v2"),
    }
    plan = worker.plan(shadows=[worker.proxies["b", None]])
    assert plan.proxied is not None
    assert plan.unproxied_rows == [1, 4, 5, 7]
    assert plan.shadows[0].rows == [0, 1, 2, 4, 5, 6, 7]
    assert [assignment.temperature for assignment in plan.shadows[0].assignments[:2]] == [0.0, 1.0]
    r0, r2, r3, r6 = plan.proxied.assignments
    assert [proxy.name for proxy in plan.proxied.proxies] == ["a", "b", "a", "a"]
    assert [assignment.strength for assignment in (r0, r2, r3, r6)] == [2.0, 1.0, 1.0, 1.0]
    assert [assignment.max_rejections for assignment in (r0, r2, r3, r6)] == [
        5,
        0,
        5,
        5,
    ]  # the proxy's own number
    assert [assignment.is_greedy for assignment in (r0, r2, r3, r6)] == [True, False, False, False]
    assert [assignment.traced for assignment in (r0, r2, r3, r6)] == [False, True, False, False]
    assert (r3.key, r3.is_seeded) == (noise_key(-5), True)
    assert not r0.is_seeded and len({assignment.key for assignment in (r0, r2, r3, r6)}) == 4
    assert set(r2.stop_ids) == {8, 9, EOS}
    assert len({id(assignment.counts) for assignment in (r0, r2, r3, r6)}) == 4


def test_an_unknown_proxy_is_said_once_and_sampled_without(caplog):
    worker = Worker()
    worker.requests = {"r0": params("unknown"), "r1": params("a", version="v9")}
    with caplog.at_level(logging.WARNING, logger="proxy.engine.request_tracker"):
        for batch in (["r0"], ["r0", "r1"], ["r1"]):
            assert worker.plan(batch).proxied is None
    assert [record.args for record in caplog.records] == [("unknown", None), ("a", "v9")]


def test_several_proxies_in_any_order():
    """The order of the names decides, because sums of more than two costs depend on it."""
    worker = Worker()
    worker.load("c")
    strengths = {"c": 0.5, "a": 1.0, "b": 2.0}
    for name, order in {"r0": "cab", "r1": "bca", "r2": "abc"}.items():
        worker.requests[name] = params(None, seed=1, proxies={key: strengths[key] for key in order})
    worker.requests["r3"] = params(None, seed=1, proxies={"b": 2.0, "a": 0.0})
    worker.requests["r4"] = params("b", seed=1, strength=2.0)
    r0, r1, r2, r3, r4 = worker.assignments()
    assert [(proxy.name, strength) for proxy, strength in r0.shares] == [
        ("a", 1.0),
        ("b", 2.0),
        ("c", 0.5),
    ]
    assert replace(r1, req_id="r0") == replace(r2, req_id="r0") == r0
    assert replace(r3, req_id="r4") == r4
    in_use = worker.tracker.proxies_in_use(worker.requests)
    assert {proxy.name for proxy in in_use} == {"a", "b", "c"}


def test_several_proxies_have_the_narrowest_nucleus_and_limit():
    worker = Worker()
    configs = {
        "x": {"max_candidates": 9, "max_rejections": 3, "top_k": 6, "top_p": 0.9},
        "y": {"max_candidates": 7, "max_rejections": 4, "top_p": 0.8},
    }
    for name, config in configs.items():
        proxy = add_proxy(worker.pool, name, random_network(1, **config)).served
        worker.proxies[name, None] = proxy
    both = {"x": 1.0, "y": 1.0}
    worker.requests = {
        "r0": params(None, proxies=both, temperature=0.0),
        "r1": params(None, proxies=both, max_rejections=8),
    }
    for request in worker.requests.values():
        request.top_k, request.top_p = 5, 0.95
    r0, r1 = worker.assignments()
    assert (r0.truncation, r1.truncation) == ((6, 0.8), (5, 0.8))
    assert (r0.max_candidates, r0.max_rejections, r1.max_rejections) == (7, 3, 8)


def test_proxies_of_different_temperatures_do_not_decide_together(caplog):
    worker = Worker()
    cool = add_proxy(worker.pool, "cool", random_network(1, temperature=0.5)).served
    worker.proxies["cool", None] = cool
    worker.requests = {"r0": params(None, proxies={"a": 1.0, "cool": 1.0})}
    with caplog.at_level(logging.WARNING, logger="proxy.engine.request_tracker"):
        assert worker.assignments() == []
    assert "a, cool are trained at different temperatures" in caplog.text


def test_params_without_anything():
    """Pooling requests have none, and warm-up ones may lack extra arguments."""
    worker = Worker()
    worker.requests = {"r0": None, "r1": SimpleNamespace(extra_args=None)}
    plan = worker.plan()
    assert (plan.req_ids, plan.proxied) == (["r0", "r1"], None)


def test_plan_is_cached_while_the_batch_is_the_same():
    worker = Worker()
    worker.requests = {"r0": params("a"), "r1": params("b")}
    first = worker.plan(["r0", "r1"])
    assignments = worker.assignments()
    assert worker.plan(["r0", "r1"]) is first
    swapped = worker.plan(["r1", "r0"])
    assert swapped is not first
    assert swapped.proxied is not None
    assert swapped.proxied.assignments == assignments[::-1]
    worker.tracker.forget_plan()
    assert worker.plan(["r1", "r0"]) is not swapped


def test_counts_add_up_and_are_taken_once():
    worker = Worker()
    worker.requests = {"x-00000001": params("a"), "y-00000002": params(None)}
    worker.step(proposed=3)
    worker.step(proposed=1)
    worker.step(proposed=5, forced=True)
    assert worker.tracker.take(["x", "y", "z"]) == {
        "x-00000001": {
            "proxy": "a",
            "version": "v1",
            "proposed": 9,
            "accepted": 2,
            "rejected": 7,
            "forced": 1,
        }
    }
    worker.step()  # one more step is under way when the counts are taken
    assert worker.tracker.take(["x"]) == {}
    worker.requests.clear()
    worker.plan([])
    assert worker.tracker.take(["x", "x-00000001"]) == {}


@pytest.mark.parametrize("request_ids", [["abc"], ["0_abc-0000000a", "1_abc-0000000a"]])
def test_samples_of_one_request_are_found_by_the_callers_id(request_ids):
    worker = Worker()
    worker.requests = {
        "0_abc-0000000a": params("a"),
        "1_abc-0000000a": params("a"),
        "abcd-0000000b": params("a"),
    }
    worker.step()
    worker.requests.clear()
    worker.plan([])  # they have finished
    assert set(worker.tracker.take(request_ids)) == {"0_abc-0000000a", "1_abc-0000000a"}
    assert set(worker.tracker.take(["abcd"])) == {"abcd-0000000b"}


def test_unfinished_prefills_do_not_count():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.step(discarded={"y"})
    worker.step()
    counts = worker.tracker.take(["x", "y"])
    assert [counts[req_id]["accepted"] for req_id in "xy"] == [2, 1]


def test_rows_after_the_end_do_not_count():
    """With asynchronous scheduling a row is sampled once more after its last token."""
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.requests["y"].stop_token_ids = [8, 9]
    worker.step(tokens={"x": EOS})
    worker.step(tokens={"y": 9})
    worker.step()
    counts = worker.tracker.take(["x", "y"])
    assert [counts[req_id]["accepted"] for req_id in "xy"] == [1, 2]


def test_a_request_keeps_the_version_it_began_with():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("b"), "early": params("late")}
    worker.step()
    worker.load("a", "v2")
    worker.load("late")
    del worker.proxies["b", None]
    worker.requests |= {"z": params("a"), "old": params("a", version="v1"), "b": params("b")}
    worker.step()
    counts = worker.tracker.take(["x", "y", "z", "old", "early", "b"])
    versions = {req_id: entry["version"] for req_id, entry in counts.items()}
    assert versions == {"x": "v1", "y": "v1", "z": "v2", "old": "v1"}
    assert [counts[req_id]["accepted"] for req_id in ("x", "y", "z", "old")] == [2, 2, 1, 1]


def test_a_preempted_request_keeps_its_counts():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.step()
    worker.step(plan=worker.plan(["y"]))
    worker.step()
    counts = worker.tracker.take(["x", "y"])
    assert [counts[req_id]["accepted"] for req_id in "xy"] == [2, 3]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_request_that_the_runner_dropped_goes_on_where_it_was(seed):
    """vLLM's second model runner forgets a preempted request and shows it again as a new one."""
    worker = Worker()
    worker.requests = {"x": params("a", seed=seed), "y": params("b")}
    worker.step()
    (assignment, _) = worker.assignments()
    dropped = worker.requests.pop("x")
    worker.step()
    assert worker.tracker.proxies_in_use(worker.requests) == {worker.proxies["b", None]}
    worker.load("a", "v2")
    worker.requests["x"] = dropped
    worker.step()
    assert worker.assignments()[1] == assignment
    counts = worker.tracker.take(["x", "y"])
    assert (counts["x"]["accepted"], counts["y"]["accepted"]) == (2, 3)
    assert counts["x"]["version"] == "v1"


def test_proxies_in_use():
    worker = Worker()
    a, b = worker.proxies["a", None], worker.proxies["b", None]
    worker.requests = {"x": params("a"), "y": params("b"), "z": params(None)}
    assert worker.tracker.proxies_in_use(worker.requests) == set()  # none has begun
    worker.step()
    assert worker.tracker.proxies_in_use(worker.requests) == {a, b}
    worker.tracker.take(["y"])  # taken while it runs: it goes on
    assert worker.tracker.proxies_in_use(worker.requests) == {a, b}
    del worker.requests["x"]
    assert worker.tracker.proxies_in_use(worker.requests) == {b}
    assert worker.tracker.take(["x"])["x"]["accepted"] == 1
    worker.requests.clear()
    assert worker.tracker.proxies_in_use(worker.requests) == set()


def test_forgetting_the_plan_counts_what_was_decided():
    """Records that are not aggregated would keep the tensors of a replaced pool."""
    worker = Worker()
    worker.requests = {"x": params("a")}
    for _ in range(3):
        worker.step()
    assert len(worker.tracker.stats._records) == 3
    worker.tracker.forget_plan()
    assert worker.tracker.stats._records == []
    assert worker.tracker.take(["x"])["x"]["accepted"] == 3


def test_unseeded_requests_draw_alike_on_all_ranks():
    """vLLM gives torch's generator the same seed on all ranks; two requests never share a key."""
    keys = []
    for _rank in range(2):
        torch.manual_seed(11)
        worker = Worker()
        torch.manual_seed(12)
        worker.requests = {f"r{i}": params("a") for i in range(5)}
        keys.append([assignment.key for assignment in worker.assignments()])
    assert keys[0] == keys[1] and len(set(keys[0])) == 5


def test_memory_is_bounded():
    """The counts of aborted requests are never taken: the oldest are dropped first, those of live requests never."""
    worker = Worker(capacity=4)
    worker.requests = {"live": params("a")}
    worker.step()
    for i in range(50):
        worker.requests = {"live": worker.requests["live"], f"r{i}": params("a")}
        worker.step()
        assert len(worker.tracker._counted) <= 4
    worker.requests = {}
    worker.plan([])
    counts = worker.tracker.take(["live", *(f"r{i}" for i in range(50))])
    assert {req_id: entry["accepted"] for req_id, entry in counts.items()} == {
        "live": 51,
        "r47": 1,
        "r48": 1,
        "r49": 1,
    }
    tracker = worker.tracker
    assert not (tracker._engine_ids or tracker._live or tracker._counted or tracker._finished)


def test_more_live_requests_than_foreseen():
    worker = Worker(capacity=2)
    worker.requests = {f"r{i}": params("a") for i in range(9)}
    worker.step()
    worker.step()
    counts = worker.tracker.take(worker.requests)
    assert [entry["accepted"] for entry in counts.values()] == [2] * 9


def test_the_counts_of_a_forgotten_request_go_to_nobody():
    worker = Worker(capacity=1)
    worker.requests = {"x": params("a")}
    worker.step(tokens={"x": EOS})
    worker.requests = {"y": params("b")}
    worker.step()
    assert worker.tracker.take(["x", "y"])["y"]["accepted"] == 1


def test_ranks_that_do_not_report_count_nothing():
    worker = Worker(reports=False)
    worker.requests = {"x": params("a", trace=True)}
    worker.step()
    assert worker.tracker.take_traces(["x"]) == {}
    assert worker.tracker.take(["x"]) == {}


def test_traces_by_the_callers_id():
    """The new entries of the traced requests, and nothing once the counts have been taken."""
    worker = Worker()
    worker.requests = {
        "0_abc-0000000a": params("a", trace=True, eos_token_id=None),
        "1_abc-0000000a": params("b", trace=True, eos_token_id=None),
        "quiet-0000000b": params("a"),
    }
    plan = worker.plan()
    assert plan.proxied is not None

    def step() -> None:
        args = torch.randn(3, 40), torch.randn(3, 12), torch.zeros(3)
        assert plan.proxied is not None
        decision, tracing = plan.proxied.decide(*args, temperature_applied=False)
        worker.tracker.stats.record(plan.proxied, decision, None, tracing)

    def lengths(request_ids: list[str]) -> dict[str, int]:
        traces = worker.tracker.take_traces(request_ids)
        return {req_id: len(entries) for req_id, entries in traces.items()}

    step()
    step()
    assert lengths(["abc", "quiet", "unknown"]) == {"0_abc-0000000a": 2, "1_abc-0000000a": 2}
    assert lengths(["abc"]) == {}
    step()
    assert lengths(["1_abc-0000000a"]) == {"1_abc-0000000a": 1}
    worker.requests.clear()
    worker.plan([])
    assert lengths(["abc"]) == {"0_abc-0000000a": 1}
    step()  # their last step was under way
    assert len(worker.tracker.take(["abc"])) == 2
    assert lengths(["abc", "0_abc-0000000a", "1_abc-0000000a"]) == {}
    assert not worker.tracker.stats.traces._num_traced
