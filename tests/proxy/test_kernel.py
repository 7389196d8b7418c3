"""The compiled kernel against the tensor functions: the same requests on the same numbers, decision by decision."""

from typing import Any

import pytest
import torch

from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.rows import ProxiedRows
from proxy.network import ProxyConfig, ProxyNetwork
from tests.proxy.proxies import every_setting

H, V, WIDTH = 64, 500, 16
CPU = torch.device("cpu")


@pytest.fixture
def threads():
    num_threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(num_threads)


def rows_of(pool: ProxyPool, count: int, *, traced: bool) -> ProxiedRows:
    """A trace makes a CPU use the tensor functions. In a large batch some rows have several proxies."""
    assignments = every_setting(pool, count, traced=traced, several=count > 5)
    return ProxiedRows(list(range(count)), assignments, pool, CPU, covers_batch=True)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_proxies", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 400])  # a few rows are projected within the loop
def test_both_decide_alike(count, num_proxies, dtype, num_threads, threads):
    """2000 rows. Rounding differs, so noise very near its limit may decide either way: about one in a million does.

    In 24 cases of 2000 rows with three such decisions each, more than two differ with probability below 1e-6.
    """
    threads(num_threads)
    torch.manual_seed(0)
    pool = ProxyPool()
    for number in range(num_proxies):
        config = ProxyConfig(
            hidden_size=H,
            vocab_size=V,
            width=WIDTH,
            max_candidates=8 + number,
            accept_bias=0.0,
            temperature=(1.0, 0.7, 1.4)[number],
            top_k=(0, 3, 0)[number],
            top_p=(0.9, 1.0, 0.6)[number],
        )
        network = ProxyNetwork(config).requires_grad_(False)
        torch.nn.init.normal_(network.score.weight, std=1.5)
        table = network.candidate_table(torch.randn(V, H))
        pool.add(ServedProxy(f"p{number}", "v", config), network.weights(), table)
    compiled_rows, tensor_rows = (rows_of(pool, count, traced=traced) for traced in (False, True))
    forced, differing = 0, 0
    for step in range(2000 // count):
        padded = (torch.randn(count, V + 12) * 3).to(dtype)  # as some heads give them
        logits = padded[:, :V]
        hidden = torch.randn(count, H).to(dtype)
        logits[step % count] = -torch.inf  # nothing is allowed
        positions = torch.full((count,), step, dtype=torch.int32)
        args: tuple[Any, ...] = logits, hidden, positions
        compiled, no_tracing = compiled_rows.decide(*args, temperature_applied=False)
        reference, tracing = tensor_rows.decide(*args, temperature_applied=False)
        assert no_tracing is None and tracing is not None
        differing += int((compiled.columns != reference.columns).any(0).sum())
        forced += int(compiled.forced.sum())
    assert differing <= 2
    assert (100 if count > 1 else -1) < forced < 1900


def test_the_kernels_constants_are_those_of_the_definition():
    """The kernel has its own, because its cache on disk would not notice that an imported one has changed."""
    from proxy import acceptance, network, noise
    from proxy.cpu import kernel

    def unsigned(*numbers: int) -> list[int]:
        return [number % 2**64 for number in numbers]

    constants = [kernel.GOLDEN_GAMMA, kernel.POSITION_STEP, kernel.MIX_1, kernel.MIX_2]
    assert constants == unsigned(noise.GOLDEN_GAMMA, noise.POSITION_STEP, *noise.MIX)
    assert pytest.approx(acceptance.UNDERFLOW, rel=1e-7) == kernel.UNDERFLOW
    assert float(kernel.MIN_LOGPROB) == network.MIN_LOGPROB
    assert kernel.NORM_FLOOR == network.NORM_FLOOR
