"""How the rows of a batch are sorted: which rows a proxy decides, which it does not, which shadows score."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import BatchPlan, make_plan
from proxy.engine.pool import ProxyPool, ServedProxy
from tests.proxy.proxies import Proxy, different_proxies


@pytest.fixture
def pool() -> ProxyPool:
    return ProxyPool()


@pytest.fixture
def proxies(pool: ProxyPool) -> dict[str, Proxy]:
    return {proxy.served.name: proxy for proxy in different_proxies(pool)}


def assign(proxies: dict[str, Proxy], name: str | None, **settings: Any) -> Assignment:
    return Assignment("r", None if name is None else proxies[name].served, **settings)


def plan_of(
    pool: ProxyPool, assignments: list[Assignment], shadows: Sequence[ServedProxy] = ()
) -> BatchPlan:
    req_ids = [f"r{row}" for row in range(len(assignments))]
    return make_plan(req_ids, assignments, pool, torch.device("cpu"), shadows=shadows)


def test_rows_with_a_proxy_among_plain_ones(pool, proxies):
    plan = plan_of(pool, [assign(proxies, name) for name in (None, "b", "a", None, "b")])
    assert plan.req_ids == ["r0", "r1", "r2", "r3", "r4"]
    assert plan.unproxied_rows == plan.unproxied_index.tolist() == [0, 3]
    rows = plan.proxied
    assert rows is not None
    assert rows.rows == [1, 2, 4]
    assert [proxy.name for proxy in rows.proxies] == ["b", "a", "b"]
    x = torch.arange(10).view(5, 2)
    assert rows.select_rows(x).tolist() == [[2, 3], [4, 5], [8, 9]]


def test_a_batch_of_one_kind(pool, proxies):
    all_proxied = plan_of(pool, [assign(proxies, name) for name in "ab"])
    assert all_proxied.proxied is not None and all_proxied.proxied.index is None
    assert all_proxied.unproxied_rows == all_proxied.unproxied_index.tolist() == []
    x = torch.zeros(2, 3)
    assert all_proxied.proxied.select_rows(x) is x
    none_proxied = plan_of(pool, [assign(proxies, None)] * 2)
    assert none_proxied.proxied is None and len(none_proxied.req_ids) == 2
    assert plan_of(pool, []).proxied is None


def test_what_shadows_may_score(pool, proxies):
    """They score as they would decide: at strength 1, with their own limits, without traces."""
    assignments = [
        assign(proxies, "a", temperature=0.0, strength=2.0, max_rejections=7, traced=True),
        assign(proxies, None, shadowed=False),
        assign(proxies, None, temperature=0.5),
    ]
    shadows = [proxies[name].served for name in "bd"]
    plan = plan_of(pool, assignments, shadows)
    assert plan.unproxied_rows == [1, 2]
    assert [rows.proxies for rows in plan.shadows] == [[shadow] * 2 for shadow in shadows]
    for rows, limit in zip(plan.shadows, (1, 8), strict=True):
        assert rows.rows == [0, 2] and not rows.any_traced
        assert rows.settings.strength is None
        assert rows.settings.max_rejections.tolist() == [limit] * 2
        assert rows.settings.greedy is not None
        assert rows.settings.greedy.tolist() == [True, False]
    assert plan_of(pool, assignments[1:2], shadows).shadows == []
    assert plan_of(pool, assignments).shadows == []


def test_what_the_logits_of_a_row_are_divided_by(pool, proxies):
    """Proxied rows by the temperature of the training, others by their own; no divisors where all are 1."""
    plan = plan_of(
        pool,
        [
            assign(proxies, "b", temperature=0.2),
            assign(proxies, None, temperature=0.2),
            assign(proxies, "c", temperature=0.0),
            assign(proxies, None, temperature=0.0),
        ],
    )
    assert plan.divisors is not None
    assert plan.divisors.tolist() == pytest.approx([0.7, 0.2, 1.3, 1.0])
    assert plan_of(pool, [assign(proxies, "a", temperature=0.2)]).divisors is None
