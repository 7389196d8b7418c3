"""The GPU's kernels against the tensor functions: the same requests on the same numbers, decision by decision.

`make test-triton` runs it on a CPU, in Triton's interpreter, which takes half a second a row. On a GPU:

    python -m tests.proxy.gpu_kernel --device cuda

It prints a line for each case, and ends with an error at the first that failed.
"""

import argparse
import os
from math import isclose
from typing import NamedTuple

import torch

from proxy.acceptance import UNDERFLOW
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.rows import ProxiedRows
from proxy.network import MIN_LOGPROB, NORM_FLOOR, ProxyConfig, ProxyNetwork, Weights
from proxy.noise import GOLDEN_GAMMA, MIX, POSITION_STEP
from tests.proxy.proxies import every_setting


class Case(NamedTuple):
    """A batch of which every other row has a proxy."""

    hidden_size: int
    vocab_size: int
    proxies: tuple[tuple[int, int], ...]  # width and max_candidates of each
    rows: int  # with a proxy
    dtype: torch.dtype
    temperature_applied: bool
    has_ties: bool


INTERPRETED = [
    Case(64, 500, ((16, 16),), 20, torch.float32, False, False),
    Case(100, 1454, ((16, 16), (24, 7), (10, 20)), 30, torch.bfloat16, True, True),
    Case(300, 9000, ((16, 5),), 12, torch.bfloat16, False, True),
]
COMPILED = [
    Case(896, 151_936, ((64, 32),), 512, torch.bfloat16, False, False),
    Case(896, 151_936, ((64, 32),), 256, torch.float32, True, False),
    Case(64, 1454, ((16, 16), (24, 7), (10, 32)), 8192, torch.bfloat16, False, True),
    Case(4096, 32_000, ((64, 16), (128, 100)), 512, torch.bfloat16, False, False),
    Case(576, 49_152, ((64, 16),), 2048, torch.bfloat16, True, True),
]
MAX_DIFFERENT = 1
"""Rounding differs, so noise very near its limit may decide either way: less than one row in a million does.

More than one among the 62 interpreted rows has a probability of 2e-9; a wrong kernel differs in most rows.
"""


def make_pool(case: Case, device: torch.device) -> ProxyPool:
    pool = ProxyPool()
    for number, (width, max_candidates) in enumerate(case.proxies):
        config = ProxyConfig(
            hidden_size=case.hidden_size,
            vocab_size=case.vocab_size,
            width=width,
            max_candidates=max_candidates,
            temperature=(1.0, 0.7)[number % 2],
        )
        network = ProxyNetwork(config).to(device)
        torch.nn.init.normal_(network.score.weight, std=1.0)  # opinions of some strength
        table = network.candidate_table(
            torch.randn(case.vocab_size, case.hidden_size, device=device)
        )
        weights = Weights(*(part.detach() for part in network.weights()))
        pool.add(ServedProxy(str(number), "0", config), weights, table.detach())
    return pool


@torch.inference_mode()
def check(case: Case, device: torch.device) -> None:
    from proxy.gpu.rows import KernelRows

    torch.manual_seed(0)
    pool = make_pool(case, device)
    places = [*range(0, 2 * case.rows, 2)]
    logits = torch.randn(2 * case.rows, case.vocab_size, device=device) * 2.5
    if case.has_ties:
        logits = logits.round()
    logits = logits.to(case.dtype)
    logits[places[3]] = -torch.inf  # nothing is allowed
    logits[places[4]] = -torch.inf
    logits[places[4], 7] = 1.0  # one token is
    hidden = torch.randn(len(logits), case.hidden_size, device=device).to(case.dtype)
    positions = torch.arange(len(logits), device=device, dtype=torch.int32) * 3

    by_kernels, by_tensors = (
        ProxiedRows(
            places,
            every_setting(pool, case.rows, traced=traced),
            pool,
            device,
            covers_batch=False,
        )
        for traced in (False, True)
    )
    kernel_rows = by_kernels.gpu_rows
    assert isinstance(kernel_rows, KernelRows)
    applied = case.temperature_applied
    actual = kernel_rows.decide(logits, hidden, positions, temperature_applied=applied)
    expected, _ = by_tensors.decide(logits, hidden, positions, temperature_applied=applied)
    num_different = int((actual.columns != expected.columns).any(0).sum())
    print(f"{case}: {num_different} decisions differ")
    assert num_different <= MAX_DIFFERENT


def check_constants() -> None:
    from proxy.gpu import kernel

    for name, expected in {
        "GOLDEN_GAMMA": GOLDEN_GAMMA,
        "POSITION_STEP": POSITION_STEP,
        "MIX_1": MIX[0],
        "MIX_2": MIX[1],
        "UNDERFLOW": UNDERFLOW,
        "MIN_LOGPROB": MIN_LOGPROB,
        "NORM_FLOOR": NORM_FLOOR,
    }.items():
        assert isclose(getattr(kernel, name).value, expected, rel_tol=1e-15), name
    print("the constants are those of the definition")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    check_constants()
    for case in INTERPRETED if device.type == "cpu" else COMPILED:
        check(case, device)


if __name__ == "__main__":
    main()
