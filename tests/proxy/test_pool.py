"""Stacked proxies: each keeps its values, and the memory of an unloaded one is freed."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from proxy.engine.pool import ProxyPool
from proxy.network import score_single
from tests.proxy.proxies import H, Proxy, V, add_proxy, different_proxies, random_network

R, K = 3, 7


def assert_unchanged(pool: ProxyPool, proxies: list[Proxy]) -> None:
    """Each proxy's scores are those of its own network, whatever its slot and its padding."""
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
    """Bytes of the storages that the pool's tensors keep alive."""
    assert pool.weights is not None and pool.tables is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in (*pool.weights, pool.tables))


def test_slots_follow_what_comes_and_goes():
    pool = ProxyPool()
    a, b, c, d = different_proxies(pool)
    assert_unchanged(pool, [a, b, c, d])
    pool.retain({a.served, c.served, d.served})
    assert_unchanged(pool, [a, c, d])
    e = add_proxy(pool, "e", random_network(5, width=3))
    assert_unchanged(pool, [a, c, d, e])
    pool.retain([e.served])
    assert_unchanged(pool, [e])
    pool.retain([])
    assert (pool.proxies, pool.weights, pool.tables) == ([], None, None)
    add_proxy(pool, "a", a.network)
    assert pool.proxies[0].slot == 0


def test_retaining_all_changes_nothing():
    pool = ProxyPool()
    a, b, c, d = different_proxies(pool)
    weights, tables = pool.weights, pool.tables
    pool.retain([proxy.served for proxy in (d, c, b, a)])
    assert pool.weights is weights and pool.tables is tables


def test_bytes_of_a_proxy():
    """H 12, V 40, W 6: state 12 x 12, product 6 x 6, logprob 6, score 6, bias 1, table 40 x 12."""
    pool = ProxyPool()
    a = add_proxy(pool, "a", random_network(1, width=6))
    assert pool.num_bytes(a.served) == num_bytes(pool) == 4 * (144 + 36 + 6 + 6 + 1 + 480)
    b = add_proxy(pool, "b", random_network(2, width=8))
    # Beside a wider one it is padded to that one's width.
    assert pool.num_bytes(a.served) == pool.num_bytes(b.served) == num_bytes(pool) // 2
    assert num_bytes(pool) == 2 * 4 * (12 * 16 + 8 * 8 + 8 + 8 + 1 + 40 * 16)


def test_what_is_unloaded_is_freed():
    pool = ProxyPool()
    a = add_proxy(pool, "a", random_network(1, width=6))
    size_before = num_bytes(pool)
    add_proxy(pool, "b", random_network(2, width=64))
    assert num_bytes(pool) > 2 * size_before
    assert pool.weights is not None and pool.tables is not None
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*pool.weights, pool.tables)]
    assert not any(ref.expired() for ref in storages)
    pool.retain([a.served])
    assert all(ref.expired() for ref in storages)
    assert num_bytes(pool) == size_before  # the padding for the wide one is gone
    assert_unchanged(pool, [a])
    assert pool.num_bytes(a.served) == size_before


def test_tensors_in_use_are_left_alone():
    """A step may still be reading them when the next proxy comes."""
    pool = ProxyPool()
    a = add_proxy(pool, "a", random_network(1, width=6))
    weights, tables = pool.weights, pool.tables
    assert weights is not None and tables is not None
    copies = [tensor.clone() for tensor in (*weights, tables)]
    add_proxy(pool, "b", random_network(2, width=16))
    pool.retain([a.served])
    for tensor, copy in zip((*weights, tables), copies, strict=True):
        assert torch.equal(tensor, copy)
