"""The cost of the hook at the sizes of a 7 B model, without vLLM: `python -m benchmarks.hook`.

Random logits, hidden states and proxy weights (H 4096, K 32) go through the functions that vLLM's samplers call. For
comparison the arithmetic of vLLM's own draw runs in plain torch: softmax and exponential race over the vocabulary and,
with a top-k or top-p, a sort of it. vLLM has faster kernels for parts of that: on a CPU for the draw
(`benchmarks.steps` times it), on CUDA for top-k and top-p.

The share of a decode step is hook / (hook + weights), where `weights` estimates the rest of the step: the time to read
7.6 B parameters of two bytes once, at the bandwidth at which this machine sums up a large tensor. Attention and other
operations would make the step longer and the share smaller.

With `--device cuda` a first pass runs with `torch.cuda.set_sync_debug_mode("error")`: it fails if anything in the hook
waits for the device. `benchmarks/clock.py` explains the columns and the times.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.clock import SAMPLING_PARTS, Clock, timed_sampling
from benchmarks.figures import write_figures
from judge.options import read_options
from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import BatchPlan, make_plan
from proxy.engine.decision_stats import DecisionStats
from proxy.engine.hook import Step, sample_proxied_rows
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.noise import noise_key

NUM_PARAMETERS = 7.6e9
BYTES_PER_PARAMETER = 2
HOOK_PARTS = (*SAMPLING_PARTS, "rest")
PARTS = (*HOOK_PARTS, "hook", "plain")
SYNC_CHECK_STEPS = 140  # more than the 128 steps after which counts are added up

SamplingName = Literal[
    "top_p 1", "top_p 0.95", "top_k 20, top_p 0.95", "T 0.3, top_p 0.95", "greedy"
]
SAMPLINGS: dict[SamplingName, dict[str, Any]] = {
    "top_p 1": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "T 0.3, top_p 0.95": {"temperature": 0.3, "top_p": 0.95},
    "greedy": {"temperature": 0.0},
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    """R, requests in the batch; all of them have a proxy."""
    vocab_sizes: tuple[int, ...] = (32_000, 152_064)
    """V."""
    hidden_size: int = 4096
    """H."""
    max_candidates: int = 32
    """K."""
    width: int = 64
    """Width of the proxy's layers."""
    proxies: int = 1
    """Loaded proxies, assigned to the rows in turns."""
    together: int = 1
    """Proxies that decide a row together; not more than are loaded."""
    seeded: bool = False
    """Every row has a seed; makes a difference on CUDA only."""
    samplings: tuple[SamplingName, ...] = ("top_p 1", "top_p 0.95", "top_k 20, top_p 0.95")
    """Sampling parameters; the temperature is 1 unless stated."""
    seconds: float = 1.0
    """Duration of each case, with at least five repetitions."""
    output: Path | None = None
    """A JSON file for the metrics."""


def medians(
    calls: Mapping[str, Callable[[], Any]], clock: Clock, options: Options
) -> dict[str, float]:
    """Median seconds of each call and of the parts inside it. Calls alternate, so each finds less in the caches than
    alone.
    """

    def lap() -> dict[str, float]:
        for name, call in calls.items():
            with clock.part(name):
                call()
        return clock.take()

    lap()
    seconds = sum(lap().values())
    laps = [lap() for _ in range(max(5, int(options.seconds / seconds)))]
    return {part: statistics.median(lap[part] for lap in laps) for part in laps[0]}


def bandwidth(clock: Clock, options: Options) -> float:
    """Bytes per second of reading."""
    tensor = torch.ones(1 << 28, device=options.device)  # 1 GiB
    seconds = medians({"read": tensor.sum}, clock, options)["read"]
    return tensor.numel() * tensor.element_size() / seconds


def load_proxies(options: Options, vocab_size: int) -> Callable[[int, SamplingName], BatchPlan]:
    """Load the proxies; returns a function that plans a batch of R rows for them."""
    device = torch.device(options.device)
    config = ProxyConfig(
        hidden_size=options.hidden_size,
        vocab_size=vocab_size,
        width=options.width,
        max_candidates=options.max_candidates,
    )
    pool = ProxyPool()
    for number in range(options.proxies):
        network = ProxyNetwork(config).to(device)
        table = torch.randn(vocab_size, 2 * options.width, device=device)
        pool.add(ServedProxy(f"proxy{number}", "0", config), network.weights(), table)

    def plan(count: int, sampling: SamplingName) -> BatchPlan:
        assignments = [
            Assignment(
                f"request{row}",
                proxy=pool.proxies[row % options.proxies],
                partners=tuple(
                    (pool.proxies[(row + number) % options.proxies], 1.0)
                    for number in range(1, options.together)
                ),
                max_rejections=config.max_rejections,
                key=noise_key(row),
                is_seeded=options.seeded,
                **SAMPLINGS[sampling],
            )
            for row in range(count)
        ]
        ids = [assignment.req_id for assignment in assignments]
        return make_plan(ids, assignments, pool, device, shadows=())

    return plan


def plain_draw(
    logits: Tensor,  # [R, V]
    top_k: Tensor | None,  # [R] int
    top_p: Tensor | None,  # [R] float
    scratch: Tensor,  # [R, V], for the remaining logits
) -> Tensor:
    """vLLM's draw in plain torch: token ids [R]."""
    if top_p is not None:
        values, index = logits.sort(-1)
        if top_k is not None:
            least = values.gather(-1, (logits.shape[-1] - top_k.long()).unsqueeze(-1))
            values.masked_fill_(values < least, -torch.inf)
        is_outside = values.softmax(-1).cumsum(-1) <= 1 - top_p.unsqueeze(-1)
        is_outside[:, -1] = False
        logits = scratch.scatter_(-1, index, values.masked_fill_(is_outside, -torch.inf))
    probabilities = logits.softmax(-1)
    return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)


@torch.inference_mode()
def measure_case(
    options: Options, clock: Clock, plan: BatchPlan, vocab_size: int, sampling: SamplingName
) -> dict[str, float]:
    """Milliseconds of the hook, of its parts and of the plain draw."""
    device, count = torch.device(options.device), len(plan.req_ids)
    logits = torch.randn(count, vocab_size, device=device) * 2.5
    hidden = torch.randn(count, options.hidden_size, device=device, dtype=torch.bfloat16)
    positions = torch.arange(count, device=device, dtype=torch.int32)
    settings = SAMPLINGS[sampling]
    k, p = settings.get("top_k"), settings.get("top_p")
    top_k = None if k is None else torch.full((count,), k, device=device, dtype=torch.int32)
    top_p = None if p is None else torch.full((count,), p, device=device)
    stats = DecisionStats(device, reports=True)
    step = Step(plan, hidden, positions, None, stats)

    def hook() -> Tensor:
        return sample_proxied_rows(step, logits, temperature_applied=False)

    if options.device == "cuda":
        refuse_syncs(hook)
        clock.take()
    scratch = torch.empty_like(logits)

    def plain() -> Tensor:
        if sampling == "greedy":
            return logits.argmax(-1)
        return plain_draw(logits, top_k, top_p, scratch)

    calls = {"rest": hook, "plain": plain}
    seconds = medians(calls, clock, options)
    milliseconds = {part: seconds.get(part, 0.0) * 1e3 for part in (*HOOK_PARTS, "plain")}
    milliseconds["hook"] = sum(milliseconds[part] for part in HOOK_PARTS)
    return {f"{part}_ms": milliseconds[part] for part in PARTS}


def refuse_syncs(hook: Callable[[], Any]) -> None:
    """Run the hook with every wait for the device made an error."""
    hook()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(SYNC_CHECK_STEPS):
            hook()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)
        name = "CPU, one thread"
    else:
        name = torch.cuda.get_device_name()
    clock = Clock(is_cuda=options.device == "cuda")
    speed = bandwidth(clock, options)
    weights_ms = NUM_PARAMETERS * BYTES_PER_PARAMETER / speed * 1e3
    cases = []
    for vocab_size in options.vocab_sizes:
        with torch.inference_mode():
            plan = load_proxies(options, vocab_size)
        for count, sampling in product(options.rows, options.samplings):
            with timed_sampling(clock, options.device):
                figures = measure_case(options, clock, plan(count, sampling), vocab_size, sampling)
            share = figures["hook_ms"] / (figures["hook_ms"] + weights_ms)
            case = {"vocab_size": vocab_size, "rows": count, "sampling": sampling}
            cases.append(case | figures | {"share_of_step": share})
    return {
        "device": name,
        "bytes_per_second": speed,
        "weights_ms": weights_ms,
        "hidden_size": options.hidden_size,
        "max_candidates": options.max_candidates,
        "proxies": options.proxies,
        "seeded": options.seeded,
        "cases": cases,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the metrics as a table for the docs, in milliseconds."""
    print(
        f"{figures['device']}: {figures['bytes_per_second'] / 1e9:.0f} GB/s, so the weights of a step "
        f"take {figures['weights_ms']:.1f} ms.\n"
    )
    print(f"| V | R | sampling | {' | '.join(PARTS)} draw | share of step |")
    print("|---" * (len(PARTS) + 4) + "|")
    for case in figures["cases"]:
        times = [f"{case[f'{part}_ms']:.3g}" for part in PARTS]
        cells = [case["vocab_size"], case["rows"], case["sampling"], *times]
        print(f"| {' | '.join(map(str, cells))} | {case['share_of_step']:.2%} |")


def main(options: Options) -> None:
    figures = measure(options)
    show(figures)
    write_figures(options.output, figures)


if __name__ == "__main__":
    main(read_options(Options, __doc__))
