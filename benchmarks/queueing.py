"""A queue of processor sharing as a model of one engine: its mean latency in closed form, and a simulation.

An engine with n rows in its batch makes one token for each in a step of `base + row * n` seconds. Reading one token of
a prompt takes `prompt_token` seconds, during which no row advances. So n rows share the engine, and together they get
more of it the more they are, up to `max_rows`: processor sharing with a rate that depends on the state. Its mean is
known in closed form, for any distribution of answer lengths. The simulation advances step by step, as vLLM's scheduler
does, and uses none of that: it checks the formula and adds the tail of the distribution.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev

BATCHES = 20
"""Batches of a simulation's requests, whose means give the standard error: consecutive latencies are not independent.
"""


@dataclass(frozen=True)
class Engine:
    """One replica: a GPU, or several that hold one copy of the LLM together."""

    base: float
    """Seconds of a step, for any number of rows."""
    row: float
    """Additional seconds for each row, including the hook's."""
    prompt_token: float
    """Seconds to read a token of a prompt, or of a judge prompt."""
    max_rows: int
    """vLLM's --max-num-seqs, or fewer if the KV cache fills up before."""
    max_step_tokens: int = 2048
    """vLLM's --max-num-batched-tokens."""

    def step(self, rows: int) -> float:
        return self.base + self.row * rows


@dataclass(frozen=True)
class Work:
    """The work of a request."""

    prompt: float
    """Tokens read before an answer, without those in the prefix cache."""
    answer: float
    """Tokens of an answer, on average."""
    samples: int = 1
    """N of best of N: rows at once."""
    judged: float = 0.0
    """Tokens that the judge reads for a request."""

    @property
    def read(self) -> float:
        return self.prompt + self.judged


def highest_rate(engine: Engine, work: Work) -> float:
    """The rate, in requests a second, above which the queue grows without limit."""
    decode = work.samples * work.answer * engine.step(engine.max_rows) / engine.max_rows
    return 1 / (decode + work.read * engine.prompt_token)


def mean_seconds(engine: Engine, work: Work, rate: float) -> float:
    """Mean latency from arrival to the last token, from p(n) ∝ ∏ λ/μ(i): λ rows arrive a second, μ(i) of i rows finish.

    Reading takes a share of the time, and the rest is left for steps. With processor sharing, the latency of an answer
    is proportional to its length, and the longest of N geometric lengths is 1 + 1/2 + ... + 1/N times the mean. An
    arrival waits for half a step. That samples of one request arrive together is neglected.

    Raises:
        ValueError: the rate is above the engine's highest.
    """
    if rate >= highest_rate(engine, work):
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
    return rows_there / arriving * longest + reading + waiting


def engines_needed(engine: Engine, work: Work, rate: float, load: float) -> int:
    """The smallest number of engines of which each has at most this load."""
    return math.ceil(rate / (load * highest_rate(engine, work)))


@dataclass
class _Reading:
    """A prompt before its answers, or a judge prompt after them."""

    request: int
    left: float
    """Tokens still to be read."""
    judged: bool = False


@dataclass
class _Row:
    request: int
    left: int
    """Tokens still to be generated."""


def simulate(engine: Engine, work: Work, rate: float, requests: int, seed: int) -> list[float]:
    """Latency of each request in seconds: Poisson arrivals, geometric lengths, first come first served.

    In a step every row gets a token, and as much of the queue is read as `max_step_tokens` leaves room for. The judge
    reads when the last sample is finished. The first tenth of the requests, which find an empty engine, is left out.
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
        done = [item.request for item in read if item.judged]
        new = [item.request for item in read if not item.judged for _ in range(work.samples)]
        waiting += [_Row(request, _length(work.answer, rng)) for request in new]
        while (
            waiting and len(running) < engine.max_rows
        ):  # a prompt gets its first token as soon as it is read
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
    """(tokens read in a step with this much room, prompts that are finished); finished prompts leave the queue."""
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
