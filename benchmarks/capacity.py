"""How many engines a rate of requests needs: `python -m benchmarks.capacity`. docs/scaling.md states the assumptions.

`benchmarks.queueing` has the model of an engine, its mean latency in closed form, and a simulation that checks it.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Literal

import aiohttp
import psutil

from benchmarks.engines import Server, serve
from benchmarks.models import get_model
from benchmarks.queueing import (
    BATCHES,
    Engine,
    Work,
    engines_needed,
    highest_rate,
    mean_seconds,
    simulate,
    summarise,
)
from judge.options import read_options

PROXY = "aligned"
RATES = (1.0, 100.0, 10_000.0)
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)


async def observe(
    server: Server, work: Work, rate: float, duration: float, seed: int
) -> list[float]:
    """Latencies in seconds of requests to the demo with its proxy that arrive as in `simulate`; at least twice
    `BATCHES`.

    All answers have the mean length. The mean latency of single answers does not depend on the distribution of lengths.
    The tail does, and so does best of N, which here has no longest sample to wait for.
    """
    rng, timeout = random.Random(seed), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(server.url, timeout=timeout, raise_for_status=True) as http:

        async def ask(number: int) -> float:
            words = rng.choices(("kettle", "freezer", "open", "fork"), k=int(work.prompt) - 9)
            body: dict[str, Any] = {
                "model": f"{server.model}:{PROXY}",
                "messages": [{"role": "user", "content": " ".join(words)}],
                "seed": number,
                "max_tokens": round(work.answer),
                "ignore_eos": True,
                "alignment": {"best_of": work.samples},
            }
            start = monotonic()
            async with http.post("/v1/chat/completions", json=body) as reply:
                await reply.read()
            return monotonic() - start

        tasks: list[asyncio.Task[float]] = []
        begin = monotonic()
        while monotonic() < begin + duration or len(tasks) < 2 * BATCHES:
            tasks.append(asyncio.create_task(ask(len(tasks))))
            await asyncio.sleep(rng.expovariate(rate))
        return await asyncio.gather(*tasks)


def cpu_seconds(server: Server) -> float:
    """CPU seconds of the HTTP process since its start; its engine is another process."""
    times = psutil.Process(server.pid).cpu_times()
    return float(times.user + times.system)


H100_BYTES, H100_FLOPS = 0.4 * 3.35e12, 0.4 * 989e12
"""Bytes and operations per second, if 40 % of the data sheet is reached, as in docs/seven-b.md."""
ENGINES = {
    # Fitted to docs/performance.md: 349, 2301 and 8134 tokens a second with 1, 8 and 64 clients, and 41 prompts of 613.
    "demo": Engine(base=2.79e-3, row=0.079e-3, prompt_token=0.034e-3, max_rows=64),
    # Qwen2.5-7B: 7.6e9 weights of 2 bytes; keys and values of 57,344 bytes a token, 640 tokens in a row.
    "7b": Engine(
        base=2 * 7.6e9 / H100_BYTES,
        row=640 * 57_344 / H100_BYTES,
        prompt_token=2 * 7.6e9 / H100_FLOPS,
        max_rows=256,
        max_step_tokens=8192,
    ),
}
WORK = {
    "demo": {
        "proxy": Work(prompt=22, answer=15),
        "proxy, long answers": Work(prompt=22, answer=128),
        "proxy, best of 8": Work(prompt=22, answer=15, samples=8, judged=1320),
    },
    "7b": {
        "proxy": Work(prompt=300, answer=250),
        "proxy, best of 8": Work(prompt=300, answer=250, samples=8, judged=14 * 900),
    },
}


def shown(seconds: Sequence[float]) -> list[str]:
    average, error, late = summarise(seconds)
    return [f"{average:.3g} ± {error:.1g}", f"{late:.3g}"]


@dataclass(frozen=True)
class Options:
    """The engine and the load."""

    engine: Literal["demo", "7b"] = "7b"
    """demo: the bundled demo on the machine of docs/performance.md; 7b: Qwen2.5-7B on an H100, computed."""
    base: float | None = None
    """Seconds of a step; replaces that engine's value, as do the next ones."""
    row: float | None = None
    """Seconds more for each row."""
    prompt_token: float | None = None
    """Seconds to read a token."""
    max_rows: int | None = None
    """Maximum number of rows at once."""
    load: float = 0.8
    """The highest load of an engine in the plan."""
    requests: int = 20_000
    """Requests of each simulation."""
    observe: float = 0.0
    """Seconds for which a real server of the demo is measured at every load, for comparison; 0 = not at all."""
    seed: int = 0
    """Seed of the simulations."""


def compare(engine: Engine, options: Options, server: Server | None) -> None:
    """Print the table of formula, simulation and, if there is one, server."""
    head = ["", "load", "requests a second", "mean s, formula", "simulated", "95 % within"]
    head += ["mean s, observed", "95 % within", "CPU ms of HTTP a request"] if server else []
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, work in WORK[options.engine].items():
        for load in LOADS:
            rate = load * highest_rate(engine, work)
            cells = [name, f"{load:.0%}", f"{rate:.3g}", f"{mean_seconds(engine, work, rate):.3g}"]
            cells += shown(simulate(engine, work, rate, options.requests, options.seed))
            if server:
                before = cpu_seconds(server)
                latencies = asyncio.run(observe(server, work, rate, options.observe, options.seed))
                cpu = (cpu_seconds(server) - before) / len(latencies)
                cells += [*shown(latencies[len(latencies) // 10 :]), f"{1e3 * cpu:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main(options: Options) -> None:
    given = {key: getattr(options, key) for key in ("base", "row", "prompt_token", "max_rows")}
    engine = replace(ENGINES[options.engine], **{k: v for k, v in given.items() if v is not None})
    if options.observe:
        model = get_model("demo")
        with serve(model, "assent", {PROXY: model.proxy}) as server:
            compare(engine, options, server)
    else:
        compare(engine, options, None)
    print("\n| | most of one engine | " + " | ".join(f"{rate:g} a second" for rate in RATES) + " |")
    print("|---" * (2 + len(RATES)) + "|")
    for name, work in WORK[options.engine].items():
        counts = [str(engines_needed(engine, work, rate, options.load)) for rate in RATES]
        print(f"| {name} | {highest_rate(engine, work):.3g} a second | {' | '.join(counts)} |")


if __name__ == "__main__":
    main(read_options(Options, __doc__))
