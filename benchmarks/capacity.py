"""How many engines a rate of requests needs: `python -m benchmarks.capacity`. docs/scaling.md says what it assumes.

An engine with n rows in its batch makes a token of each in a step of `base + row * n` seconds, and reads a prompt's
token in `prompt_token` seconds, during which the others wait. So n rows share it, and get the more of it together
the more they are, up to `max_rows`: a queue of processor sharing whose rate depends on its state. Its mean is known
in closed form, whatever the distribution of the answers' lengths. The simulation goes step by step, as vLLM's scheduler
does, and has none of that: it checks the formula, and gives the tail that the formula does not.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles, stdev
from time import monotonic
from typing import Any

import aiohttp
import tyro

RATES = (1.0, 100.0, 10_000.0)
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
BATCHES = 20
"""Of a simulation's requests, whose means give the standard error: successive latencies are not independent."""


@dataclass(frozen=True)
class Engine:
    """One replica: a GPU, or several that hold one copy of the LLM together."""

    base: float
    """Seconds of a step, however few rows it has."""
    row: float
    """Seconds more for each row, the hook's part included."""
    prompt_token: float
    """Seconds to read a token of a prompt, or of what the judge reads."""
    max_rows: int
    """vLLM's --max-num-seqs, or fewer if the KV cache is full before."""
    max_step_tokens: int = 2048
    """vLLM's --max-num-batched-tokens."""

    def step(self, rows: int) -> float:
        return self.base + self.row * rows


@dataclass(frozen=True)
class Work:
    """What a request asks for."""

    prompt: float
    """Tokens read before an answer, those found in the prefix cache left out."""
    answer: float
    """Tokens of an answer, on average."""
    samples: int = 1
    """N of best of N: rows at once."""
    judged: float = 0.0
    """Tokens that the judge reads for a request."""

    @property
    def read(self) -> float:
        return self.prompt + self.judged


@dataclass(frozen=True)
class Outlook:
    """Of one engine at one rate."""

    load: float
    """Share of the highest rate that it could bear."""
    rows: float
    """In the batch or before it, on average."""
    seconds: float
    """From arrival to the last token, on average."""


def highest_rate(engine: Engine, work: Work) -> float:
    """Requests a second beyond which the queue grows for ever."""
    decode = work.samples * work.answer * engine.step(engine.max_rows) / engine.max_rows
    return 1 / (decode + work.read * engine.prompt_token)


def outlook(engine: Engine, work: Work, rate: float) -> Outlook:
    """The stationary mean: p(n) ∝ ∏ λ/μ(i), with λ rows a second that come and μ(i) of i rows that end.

    Reading takes a share of the time, and the rest is left for steps. With processor sharing an answer takes a time in
    proportion to its length, and the longest of N geometric ones has 1 + 1/2 + ... + 1/N times the mean length. Who
    comes waits for half a step. That samples of one request come together is left out.

    Raises:
        ValueError: the rate is beyond what the engine bears.
    """
    load = rate / highest_rate(engine, work)
    if load >= 1:
        raise ValueError(f"one engine bears {highest_rate(engine, work):.3g} requests a second")
    arriving = rate * work.samples
    left = 1 - rate * work.read * engine.prompt_token
    weight, total, weighted, n = 1.0, 1.0, 0.0, 0
    while n < engine.max_rows or weight > 1e-12 * total:
        n += 1
        rows = min(n, engine.max_rows)
        weight *= arriving * work.answer * engine.step(rows) / (rows * left)
        total += weight
        weighted += n * weight
    rows_there = weighted / total
    longest = sum(1 / i for i in range(1, work.samples + 1))
    reading = work.read * engine.prompt_token / left
    waiting = engine.step(min(math.ceil(rows_there), engine.max_rows)) / 2
    return Outlook(load, rows_there, rows_there / arriving * longest + reading + waiting)


def engines_needed(engine: Engine, work: Work, rate: float, *, seconds: float, load: float) -> int:
    """The fewest that keep the mean below `seconds` and each one's load below `load`; requests go to any at random.

    Raises:
        ValueError: one request alone takes longer.
    """
    alone = outlook(engine, work, 1e-9).seconds
    if alone > seconds:
        raise ValueError(
            f"a request alone takes {alone:.3g} seconds, and {seconds:g} are asked for"
        )
    count = math.ceil(rate / (load * highest_rate(engine, work)))
    while outlook(engine, work, rate / count).seconds > seconds:
        count += math.ceil(count / 100)
    return count


@dataclass
class _Reading:
    """A prompt before its answers, or what the judge reads after them."""

    request: int
    left: float
    """Tokens still to be read."""
    judged: bool = False


@dataclass
class _Row:
    request: int
    left: int
    """Tokens still to be made."""


def simulate(engine: Engine, work: Work, rate: float, requests: int, seed: int) -> list[float]:
    """Seconds that each request took: Poisson arrivals, geometric lengths, first come first served.

    In a step every row gets a token, and as much is read of what waits as `max_step_tokens` leaves room for. The judge
    reads when the last sample is done. The first tenth of the requests, from an empty engine, is left out.
    """
    rng = random.Random(seed)
    clock, came = 0.0, []
    for _ in range(requests):
        clock += rng.expovariate(rate)
        came.append(clock)
    arriving, reading, waiting = deque(range(requests)), deque[_Reading](), deque[_Row]()
    running: list[_Row] = []
    samples = [work.samples] * requests
    seconds = [0.0] * requests
    now, ended = 0.0, 0
    while ended < requests:
        if not (running or reading):
            now = max(now, came[arriving[0]])
        while arriving and came[arriving[0]] <= now:
            reading.append(_Reading(arriving.popleft(), work.prompt))
        tokens, read = _read(reading, engine.max_step_tokens - len(running))
        now += engine.prompt_token * tokens + (engine.step(len(running)) if running else 0.0)
        done = [each.request for each in read if each.judged]
        new = [each.request for each in read if not each.judged for _ in range(work.samples)]
        waiting += [_Row(request, _length(work.answer, rng)) for request in new]
        while waiting and len(running) < engine.max_rows:  # a prompt that has been read has a token
            running.append(waiting.popleft())
        for row in running:
            row.left -= 1
            samples[row.request] -= row.left == 0
            if row.left == 0 and samples[row.request] == 0:
                if work.judged:
                    reading.append(_Reading(row.request, work.judged, judged=True))
                else:
                    done.append(row.request)
        running = [row for row in running if row.left]
        for request in done:
            seconds[request] = now - came[request]
        ended += len(done)
    return seconds[requests // 10 :]


def _read(reading: deque[_Reading], room: float) -> tuple[float, list[_Reading]]:
    """(tokens read in a step with room for so many, what is read to its end); that is taken out of the queue."""
    tokens, done = 0.0, []
    while reading and tokens < room:
        part = min(room - tokens, reading[0].left)
        reading[0].left -= part
        tokens += part
        if reading[0].left == 0:
            done.append(reading.popleft())
    return tokens, done


def _length(mean: float, rng: random.Random) -> int:
    return 1 + int(math.log(1 - rng.random()) / math.log1p(-1 / mean))


def summarise(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(mean, its standard error, 95th percentile)."""
    size = len(seconds) // BATCHES
    means = [fmean(seconds[i * size : (i + 1) * size]) for i in range(BATCHES)]
    return fmean(seconds), stdev(means) / BATCHES**0.5, quantiles(seconds, n=20)[18]


async def observe(url: str, work: Work, rate: float, requests: int, seed: int) -> list[float]:
    """Seconds that requests to a server with a proxy take which come as in `simulate`; all answers are of one length.

    The mean does not depend on the lengths' distribution; the tail does.
    """
    rng, timeout = random.Random(seed), aiohttp.ClientTimeout(600)
    async with aiohttp.ClientSession(url, timeout=timeout, raise_for_status=True) as http:
        async with http.get("/v1/models") as reply:
            models = [each["id"] for each in (await reply.json())["data"]]
        model = next(name for name in models if name.endswith(":aligned"))

        async def ask(number: int) -> float:
            words = rng.choices(("kettle", "freezer", "open", "fork"), k=int(work.prompt) - 9)
            body: dict[str, Any] = {
                "model": model,
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

        tasks = []
        for number in range(requests):
            tasks.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(rng.expovariate(rate))
        return (await asyncio.gather(*tasks))[requests // 10 :]


ENGINES = {
    # Fitted to docs/performance.md: with 1, 8 and 64 clients 349, 2301 and 8134 tokens a second, and 41 prompts of 613.
    "demo": Engine(base=2.79e-3, row=0.079e-3, prompt_token=0.034e-3, max_rows=64),
    # Computed as in docs/seven-b.md, 40 % of an H100's data sheet, 57 kB of keys and values a token, 640 tokens a row.
    "7b": Engine(
        base=11.4e-3, row=0.027e-3, prompt_token=0.038e-3, max_rows=256, max_step_tokens=8192
    ),
}
WORK = {
    "demo": {
        "proxy": Work(prompt=22, answer=15),
        "proxy, best of 8": Work(prompt=22, answer=15, samples=8, judged=1500),
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
    """Which engine, and what is asked of it."""

    engine: str = "7b"
    """Of `ENGINES`: demo, 7b."""
    base: float | None = None
    """Seconds of a step, instead of that engine's; likewise the next ones."""
    row: float | None = None
    """Seconds more for each row."""
    prompt_token: float | None = None
    """Seconds to read a token."""
    max_rows: int | None = None
    """Rows at once."""
    load: float = 0.8
    """The highest load of an engine that is planned with."""
    seconds: float = 60.0
    """The longest mean latency that is planned with."""
    requests: int = 20_000
    """Of each simulation."""
    base_url: str | None = None
    """A server of such an engine to compare with; it is asked a tenth as many requests."""
    seed: int = 0
    """Of the simulations."""


def main(options: Options) -> None:
    given = {key: getattr(options, key) for key in ("base", "row", "prompt_token", "max_rows")}
    engine = replace(ENGINES[options.engine], **{k: v for k, v in given.items() if v is not None})
    head = ["", "load", "requests a second", "mean s, formula", "simulated", "95 % within"]
    head += ["mean s, observed", "95 % within"] if options.base_url else []
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, work in WORK[options.engine].items():
        most = highest_rate(engine, work)
        for load in LOADS:
            expected = outlook(engine, work, load * most)
            found = simulate(engine, work, load * most, options.requests, options.seed)
            cells = [name, f"{load:.0%}", f"{load * most:.3g}", f"{expected.seconds:.3g}"]
            cells += shown(found)
            if options.base_url:
                few, seed = options.requests // 10, options.seed
                cells += shown(asyncio.run(observe(options.base_url, work, load * most, few, seed)))
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| | most of one engine | " + " | ".join(f"{rate:g} a second" for rate in RATES) + " |")
    print("|---" * (2 + len(RATES)) + "|")
    for name, work in WORK[options.engine].items():
        counts = [
            engines_needed(engine, work, rate, seconds=options.seconds, load=options.load)
            for rate in RATES
        ]
        cells = [name, f"{highest_rate(engine, work):.3g} a second", *map(str, counts)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
