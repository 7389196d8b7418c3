"""How the rows of a batch are sorted: who is decided by a proxy, who is not, whom shadows score."""

from typing import Any

import pytest
import torch

from proxy.plan import Plan, make_plan
from proxy.pool import ProxyPool
from proxy.rows import Assignment
from tests.proxy.proxies import Proxy, unlike_proxies


@pytest.fixture
def pool() -> ProxyPool:
    return ProxyPool()


@pytest.fixture
def proxies(pool: ProxyPool) -> dict[str, Proxy]:
    return {proxy.served.name: proxy for proxy in unlike_proxies(pool)}


def assign(proxies: dict[str, Proxy], name: str | None, **settings: Any) -> Assignment:
    return Assignment("r", None if name is None else proxies[name].served, **settings)


def plan_of(pool: ProxyPool, assignments: list[Assignment], *, has_shadows: bool = False) -> Plan:
    req_ids = [f"r{row}" for row in range(len(assignments))]
    return make_plan(req_ids, assignments, pool, torch.device("cpu"), has_shadows=has_shadows)


def test_rows_with_a_proxy_among_plain_ones(pool, proxies):
    plan = plan_of(pool, [assign(proxies, name) for name in (None, "b", "a", None, "b")])
    assert plan.req_ids == ["r0", "r1", "r2", "r3", "r4"]
    assert plan.plain_rows == plan.plain_index.tolist() == [0, 3]
    rows = plan.aligned
    assert rows is not None
    assert rows.rows == [1, 2, 4]
    assert [proxy.name for proxy in rows.proxies] == ["b", "a", "b"]
    x = torch.arange(10).view(5, 2)
    assert rows.pick(x).tolist() == [[2, 3], [4, 5], [8, 9]]


def test_a_batch_of_one_kind(pool, proxies):
    everyone = plan_of(pool, [assign(proxies, name) for name in "ab"])
    assert everyone.aligned is not None and everyone.aligned.index is None
    assert everyone.plain_rows == everyone.plain_index.tolist() == []
    x = torch.zeros(2, 3)
    assert everyone.aligned.pick(x) is x
    nobody = plan_of(pool, [assign(proxies, None)] * 2)
    assert nobody.aligned is None and len(nobody.req_ids) == 2
    assert plan_of(pool, []).aligned is None


def test_what_shadows_may_score(pool, proxies):
    assignments = [
        assign(proxies, "a", temperature=0.0),
        assign(proxies, None, shadowed=False),
        assign(proxies, None),
    ]
    plan = plan_of(pool, assignments, has_shadows=True)
    assert plan.shadowed is not None and plan.greedy is not None
    assert plan.plain_rows == [1, 2]
    assert plan.shadowed.tolist() == [True, False, True]
    assert plan.greedy.tolist() == [True, False, False]
    assert plan_of(pool, assignments[1:2], has_shadows=True).shadowed is None
    without = plan_of(pool, assignments)
    assert (without.shadowed, without.greedy) == (None, None)
