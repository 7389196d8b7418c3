"""Stacked proxies: each stays what it was, and what goes leaves nothing behind."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from proxy.engine.pool import ProxyPool
from proxy.network import score_single
from tests.proxy.proxies import H, Proxy, V, opinionated, put_into, unlike_proxies

R, K = 3, 7


def assert_each_is_itself(pool: ProxyPool, proxies: list[Proxy]) -> None:
    """Whatever its slot and however it was padded: the very numbers of its own network."""
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(R, H, generator=rng) * 20
    token_ids = torch.randint(V, (R, K), generator=rng)
    logprobs = -torch.rand(R, K, generator=rng) * 9
    assert pool.proxies == [proxy.served for proxy in proxies]
    for slot, proxy in enumerate(proxies):
        assert proxy.served.slot == slot
        weights, table = pool.single(proxy.served)
        scores = score_single(weights, hidden, table[token_ids], logprobs)
        expected = proxy.score_single(hidden, token_ids, logprobs)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def num_bytes(pool: ProxyPool) -> int:
    """What the pool's tensors keep from being freed, views' backing included."""
    assert pool.weights is not None and pool.tables is not None
    return sum(t.untyped_storage().nbytes() for t in (*pool.weights, pool.tables))


def test_slots_follow_what_comes_and_goes():
    pool = ProxyPool()
    a, b, c, d = unlike_proxies(pool)
    assert_each_is_itself(pool, [a, b, c, d])
    pool.retain({a.served, c.served, d.served})
    assert_each_is_itself(pool, [a, c, d])
    e = put_into(pool, "e", opinionated(5, width=3))
    assert_each_is_itself(pool, [a, c, d, e])
    pool.retain([e.served])
    assert_each_is_itself(pool, [e])
    pool.retain([])
    assert (pool.proxies, pool.weights, pool.tables) == ([], None, None)
    put_into(pool, "a", a.network)
    assert pool.proxies[0].slot == 0


def test_retaining_all_changes_nothing():
    pool = ProxyPool()
    a, b, c, d = unlike_proxies(pool)
    weights, tables = pool.weights, pool.tables
    pool.retain([p.served for p in (d, c, b, a)])
    assert pool.weights is weights and pool.tables is tables


def test_bytes_of_a_proxy():
    """H 12, V 40, W 6: state 12 x 12, product 6 x 6, logprob 6, score 6, bias 1, table 40 x 12."""
    pool = ProxyPool()
    a = put_into(pool, "a", opinionated(1, width=6))
    assert pool.num_bytes(a.served) == num_bytes(pool) == 4 * (144 + 36 + 6 + 6 + 1 + 480)
    b = put_into(pool, "b", opinionated(2, width=8))
    # Beside a wider one it is padded to that one's width.
    assert pool.num_bytes(a.served) == pool.num_bytes(b.served) == num_bytes(pool) // 2
    assert num_bytes(pool) == 2 * 4 * (12 * 16 + 8 * 8 + 8 + 8 + 1 + 40 * 16)


def test_what_is_unloaded_is_freed():
    pool = ProxyPool()
    a = put_into(pool, "a", opinionated(1, width=6))
    before = num_bytes(pool)
    put_into(pool, "b", opinionated(2, width=64))
    assert num_bytes(pool) > 2 * before
    assert pool.weights is not None and pool.tables is not None
    old = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*pool.weights, pool.tables)]
    assert not any(ref.expired() for ref in old)
    pool.retain([a.served])
    assert all(ref.expired() for ref in old)
    assert num_bytes(pool) == before  # padding for the wide one has gone with it
    assert_each_is_itself(pool, [a])
    assert pool.num_bytes(a.served) == before


def test_tensors_in_use_are_left_alone():
    """A step may still be reading them when the next proxy comes."""
    pool = ProxyPool()
    a = put_into(pool, "a", opinionated(1, width=6))
    weights, tables = pool.weights, pool.tables
    assert weights is not None and tables is not None
    copies = [tensor.clone() for tensor in (*weights, tables)]
    put_into(pool, "b", opinionated(2, width=16))
    pool.retain([a.served])
    for tensor, copy in zip((*weights, tables), copies, strict=True):
        assert torch.equal(tensor, copy)
