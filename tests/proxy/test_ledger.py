"""Assignments and counts, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxy.acceptance import Decision
from proxy.ledger import Ledger, Plan, ServedProxy
from proxy.network import ProxyConfig, ProxyNetwork

EOS = 1


def served(name: str, version: str = "v1") -> ServedProxy:
    network = ProxyNetwork(ProxyConfig(hidden_size=4, vocab_size=10, width=2, max_rejections=5))
    totals = torch.zeros(3, dtype=torch.int64)
    return ServedProxy(name, version, network, torch.zeros(10, 2), totals)


def params(proxy: str | None, **alignment: Any) -> Any:
    extra_args = {"alignment": {"proxy": proxy, **alignment}} if proxy else None
    return SimpleNamespace(extra_args=extra_args, stop_token_ids=[], eos_token_id=EOS)


class Worker:
    """The requests that a worker has in hand, and its ledger."""

    def __init__(self, **kwargs: Any) -> None:
        self.ledger = Ledger(torch.device("cpu"), **kwargs)
        self.requests: dict[str, Any] = {}
        self.proxies = {name: served(name) for name in ("a", "b")}

    def plan(self, batch: list[str] | None = None) -> Plan:
        batch = list(self.requests) if batch is None else batch
        return self.ledger.plan(
            batch, self.requests.__getitem__, self.requests.keys(), self.proxies
        )

    def step(
        self,
        tokens: dict[str, int] | None = None,
        proposed: int = 3,
        forced: bool = False,
        discarded: set[str] = frozenset(),  # type: ignore[assignment]
        plan: Plan | None = None,
    ) -> None:
        """Decide for every row alike; token 7 unless told otherwise."""
        plan = plan or self.plan()
        mask = torch.tensor([req_id in discarded for req_id in plan.req_ids])
        for group in plan.groups:
            ids = [(tokens or {}).get(plan.req_ids[row], 7) for row in group.rows]
            rows = len(ids)
            decision = Decision(
                slots=torch.zeros(rows, dtype=torch.int64),
                token_ids=torch.tensor(ids),
                num_proposed=torch.full((rows,), proposed),
                forced=torch.full((rows,), forced),
            )
            self.ledger.record(group, decision, mask)


def test_rows_are_grouped_by_proxy():
    worker = Worker()
    worker.requests = {
        "r0": params("a", strength=2.0),
        "r1": params(None),
        "r2": params("b", max_rejections=0),
        "r3": params("a"),
        "r4": params("unknown"),
        "r5": params("b", strength=0),
    }
    plan = worker.plan()
    a, b = plan.groups
    assert (a.proxy.name, a.rows, a.strength.tolist()) == ("a", [0, 3], [2.0, 1.0])
    assert a.max_rejections.tolist() == [5, 5]  # the proxy's own number
    assert (b.proxy.name, b.rows, b.max_rejections.tolist()) == ("b", [2], [0])
    assert plan.plain_rows == plan.plain_index.tolist() == [1, 4, 5]


def test_plan_is_cached_while_the_batch_is_the_same():
    worker = Worker()
    worker.requests = {"r0": params("a"), "r1": params("b")}
    first = worker.plan(["r0", "r1"])
    assert worker.plan(["r0", "r1"]) is first
    swapped = worker.plan(["r1", "r0"])
    assert [(g.proxy.name, g.rows) for g in swapped.groups] == [("b", [0]), ("a", [1])]
    slots = {g.proxy.name: g.slots.tolist() for g in first.groups}
    assert {g.proxy.name: g.slots.tolist() for g in swapped.groups} == slots


def test_counts_add_up_and_are_taken_once():
    worker = Worker()
    worker.requests = {"x-00000001": params("a"), "y-00000002": params(None)}
    worker.step(proposed=3)
    worker.step(proposed=1)
    worker.step(proposed=5, forced=True)
    assert worker.ledger.take(["x", "y", "z"]) == {
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
    assert worker.ledger.take(["x"]) == {}
    worker.requests.clear()
    worker.plan([])
    assert worker.ledger.take(["x", "x-00000001"]) == {}


@pytest.mark.parametrize("asked", [["abc"], ["0_abc-0000000a", "1_abc-0000000a"]])
def test_samples_of_one_request_are_found_by_the_callers_id(asked):
    worker = Worker()
    worker.requests = {
        "0_abc-0000000a": params("a"),
        "1_abc-0000000a": params("a"),
        "abcd-0000000b": params("a"),
    }
    worker.step()
    worker.requests.clear()
    worker.plan([])  # they have finished
    assert set(worker.ledger.take(asked)) == {"0_abc-0000000a", "1_abc-0000000a"}
    assert set(worker.ledger.take(["abcd"])) == {"abcd-0000000b"}


def test_unfinished_prefills_do_not_count():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.step(discarded={"y"})
    worker.step()
    counts = worker.ledger.take(["x", "y"])
    assert [counts[r]["accepted"] for r in "xy"] == [2, 1]


def test_rows_after_the_end_do_not_count():
    """With asynchronous scheduling a row is sampled once more after its last token."""
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.requests["y"].stop_token_ids = [8, 9]
    worker.step(tokens={"x": EOS})
    worker.step(tokens={"y": 9})
    worker.step()
    counts = worker.ledger.take(["x", "y"])
    assert [counts[r]["accepted"] for r in "xy"] == [1, 2]


def test_a_request_keeps_the_version_it_began_with():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("b"), "early": params("late")}
    worker.step()
    worker.proxies = {"a": served("a", "v2"), "late": served("late")}
    worker.requests["z"] = params("a")
    worker.step()
    assert [g.proxy.version for g in worker.plan().groups] == ["v1", "v1", "v2"]
    counts = worker.ledger.take(["x", "y", "z", "early"])
    assert {r: c["version"] for r, c in counts.items()} == {"x": "v1", "y": "v1", "z": "v2"}
    assert [counts[r]["accepted"] for r in "xyz"] == [2, 2, 1]


def test_a_preempted_request_keeps_its_counts():
    worker = Worker()
    worker.requests = {"x": params("a"), "y": params("a")}
    worker.step()
    worker.step(plan=worker.plan(["y"]))
    worker.step()
    counts = worker.ledger.take(["x", "y"])
    assert [counts[r]["accepted"] for r in "xy"] == [2, 3]


def test_memory_is_bounded():
    """Nobody asks for what was aborted: the oldest is forgotten first, the live never."""
    worker = Worker(capacity=4)
    worker.requests = {"live": params("a")}
    worker.step()
    for i in range(50):
        worker.requests = {"live": worker.requests["live"], f"r{i}": params("a")}
        worker.step()
    worker.requests = {}
    worker.plan([])
    counts = worker.ledger.take(["live", *(f"r{i}" for i in range(50))])
    assert {r: c["accepted"] for r, c in counts.items()} == {
        "live": 51,
        "r47": 1,
        "r48": 1,
        "r49": 1,
    }
    assert worker.ledger._counts.shape == (5, 3)
    assert not worker.ledger._internal_ids and not worker.ledger._live


def test_more_live_requests_than_foreseen():
    worker = Worker(capacity=2)
    worker.requests = {f"r{i}": params("a") for i in range(9)}
    worker.step()
    worker.step()
    counts = worker.ledger.take(worker.requests)
    assert [c["accepted"] for c in counts.values()] == [2] * 9


def test_a_slot_starts_from_zero_for_its_next_owner():
    worker = Worker(capacity=1)
    worker.requests = {"x": params("a")}
    worker.step(tokens={"x": EOS})
    worker.requests = {"y": params("b")}
    worker.step()
    assert worker.ledger.take(["x", "y"])["y"]["accepted"] == 1


def test_ranks_that_do_not_report_count_nothing():
    worker = Worker(reports=False)
    worker.requests = {"x": params("a")}
    worker.step()
    assert worker.ledger.take(["x"]) == {}
    assert worker.proxies["a"].totals.tolist() == [0, 0, 0]


def test_metrics():
    from prometheus_client import REGISTRY

    def read(name: str) -> float:
        return REGISTRY.get_sample_value(name, {"proxy": "metered"}) or 0.0

    worker = Worker()
    worker.proxies = {"metered": served("metered")}
    worker.requests = {"x": params("metered"), "y": params("metered"), "z": params(None)}
    worker.step(proposed=4)
    worker.step(proposed=6, forced=True)
    assert read("assent_tokens_aligned_total") == 4
    assert read("assent_candidates_proposed_total") == 20
    assert read("assent_candidates_rejected_total") == 18
    assert read("assent_candidates_forced_total") == 2
