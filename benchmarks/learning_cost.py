"""The cost of learning while serving: `python -m benchmarks.learning_cost`.

Clients stream answers one after another. In alternating turns the server is otherwise idle, or it learns: an
administrator requests one pass after another over the same verdicts. Their responses were read before; with `--reading`
the engine has to read them again in every pass. The turns of a round have random order, and each round gives one ratio.
"""

import asyncio
import hashlib
import json
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any, NamedTuple

import aiohttp

from benchmarks.engines import Server, serve
from benchmarks.models import get_model
from benchmarks.toy_prompts import DATA_SEED
from judge.feedback import Feedback, Preference
from judge.messages import Message
from judge.options import read_options
from training.toy_data.files import draw_pair, draw_prompts, split_combinations

KEY = "sk-operator"
ACCESS = f"""
[keys.operator]
sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
admin = true
"""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    clients: int = 16
    """Concurrent streams."""
    rounds: int = 10
    """Rounds, each with one turn of either kind."""
    seconds: float = 15.0
    """Seconds of a turn."""
    verdicts: int = 300
    """Verdicts in the database."""
    reading: bool = False
    """Make the engine read the responses in every pass."""
    seed: int = 0
    """Seed of prompts, verdicts and order."""
    output: Path | None = None
    """A JSON file for the metrics."""


class Turn(NamedTuple):
    """The measurements of one turn."""

    tokens_per_second: float
    p99: float
    """Seconds between two tokens of a stream, 99th percentile."""


def verdicts(count: int, seed: int) -> list[Preference]:
    """Random verdicts: no version will ever pass the test, and every pass runs completely."""
    rng = random.Random(seed)
    prompts = draw_prompts(split_combinations(DATA_SEED)[0], rng)
    preferences = []
    for prompt in islice(prompts, count):
        chosen, rejected = rng.sample(draw_pair(prompt, rng), 2)
        turns = [Message(role="user", content=prompt.text)]
        preferences.append(Preference("person", turns, chosen, rejected, caller="operator"))
    return preferences


async def stream(http: aiohttp.ClientSession, model: str, prompt: str, gaps: list[float]) -> int:
    """Send a request and record the seconds between its tokens; returns the number of tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 64,
        "ignore_eos": True,
        "stream": True,
    }
    count, last = 0, 0.0
    async with http.post("/v1/chat/completions", json=body) as answer:
        async for line in answer.content:
            if not line.startswith(b'data: {"id'):
                continue
            now = monotonic()
            if count:
                gaps.append(now - last)
            count, last = count + 1, now
    return count


async def turn(http: aiohttp.ClientSession, server: Server, options: Options, seed: int) -> Turn:
    begin, gaps = monotonic(), list[float]()
    prompts = draw_prompts(split_combinations(DATA_SEED)[2], random.Random(seed))

    async def client() -> int:
        count = 0
        while monotonic() - begin < options.seconds:
            count += await stream(http, server.model, next(prompts).text, gaps)
        return count

    counts = await asyncio.gather(*(client() for _ in range(options.clients)))
    return Turn(sum(counts) / (monotonic() - begin), quantiles(gaps, n=100)[-1])


@asynccontextmanager
async def learning(http: aiohttp.ClientSession, root: Path, reading: bool) -> AsyncIterator[None]:
    """Keep the server learning inside the block."""

    async def passes() -> None:
        while True:
            if reading:
                for path in (root / ".learn").glob("positions.db*"):
                    path.unlink()
            async with http.post("/proxies/learned/learn") as answer:
                report = (await answer.json())["passes"][0]
                assert report.get("verdicts"), report

    task = asyncio.create_task(passes())
    try:
        yield
    finally:
        task.cancel()


async def measure(server: Server, options: Options, root: Path) -> list[dict[str, Any]]:
    rows, rng = [], random.Random(options.seed)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(
        server.url, headers=headers, timeout=aiohttp.ClientTimeout(3600), raise_for_status=True,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
    ) as http:  # fmt: skip
        async with http.post(
            "/proxies/learned/learn"
        ) as answer:  # the learner's start is not counted as a pass
            print(await answer.json())
        await turn(http, server, options, seed=0)
        for number in range(options.rounds):
            measured: dict[bool, Turn] = {}
            for learns in rng.sample([False, True], 2):
                if learns:
                    async with learning(http, root, options.reading):
                        measured[True] = await turn(http, server, options, number)
                    async with http.post("/proxies/learned/learn"):
                        pass  # waits for its last pass
                else:
                    measured[False] = await turn(http, server, options, number)
            throughput = measured[True].tokens_per_second / measured[False].tokens_per_second
            row = {"throughput": throughput, "p99": measured[True].p99 / measured[False].p99}
            turns = {"idle": measured[False]._asdict(), "learning": measured[True]._asdict()}
            rows.append(row | turns)
            print(rows[-1], flush=True)
    return rows


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "access.toml").write_text(ACCESS)
        (root / "proxies").mkdir()
        feedback = Feedback(str(root / "feedback.db"))
        feedback.add(verdicts(options.verdicts, options.seed))
        feedback.close()
        flags: list[str | Path] = [
            *("--access", root / "access.toml", "--feedback", root / "feedback.db"),
            *("--proxy-root", root / "proxies"),
        ]
        with serve(get_model("demo"), "assent", {}, flags) as server:
            rows = asyncio.run(measure(server, options, root / "proxies"))
    for name in ("throughput", "p99"):
        ratios = [row[name] for row in rows]
        low, _, high = quantiles(ratios, n=4)
        print(f"{name}, learning / idle: {median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read_options(Options, __doc__))
