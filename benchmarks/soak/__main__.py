"""A real server under load for a quarter of an hour: `make soak`, or `python -m benchmarks.soak`.

Some more clients are hostile: endless headers, half-open connections, streams that nobody reads, texts far too long for
the judge, bodies that would make gigabytes of errors. At the end the memory is where it was in the middle, and SIGTERM
ends the server with status 0.

First every question is sent to the otherwise idle server. Then 64 clients send them concurrently, in random order,
together with streams, judgments, feedback, cancelled and invalid requests, while proxies are loaded, replaced and
unloaded. An answer is right if its text equals the idle server's with the same version of the proxy. The engine
computes in float32, because bfloat16 kernels round differently in another batch.
"""

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import linear_regression, mean, median, quantiles
from time import monotonic
from typing import Any

import aiohttp
import psutil
import torch
from sqlalchemy import create_engine, text

from benchmarks.engines import Server, serve
from benchmarks.models import DEMO, get_model
from benchmarks.soak.crowd import Crowd, ask_quietly
from benchmarks.soak.hostile import Attacker
from benchmarks.soak.requests import FIXED, MOVING, questions
from judge.options import read_options
from proxy.checkpoint import load, save
from training.toy_data.files import draw_prompts, split_combinations

WATCH_SECONDS = 5.0
MAX_GROWTH = 200.0
"""Megabytes that the server may have grown by, from the middle of the run to the time after it."""


@dataclass(frozen=True)
class Options:
    """The load."""

    clients: int = 64
    """Concurrent clients."""
    minutes: float = 15.0
    """Duration in minutes."""
    hostile: int = 8
    """Concurrent clients that want to exhaust the server."""
    prompts: int = 8
    """Different prompts."""
    seeds: int = 4
    """Seeds for each prompt of a chat."""
    seed: int = 0
    """Seed of all random choices here."""
    output: Path | None = None
    """A JSON file for the metrics."""


@dataclass(frozen=True)
class Sample:
    """Resources of the server's processes at one moment."""

    minutes: float
    megabytes: float
    """Proportional set size (PSS)."""
    files: int
    """File descriptors."""
    threads: int


def look(server: Server, begin: float) -> Sample:
    parent = psutil.Process(server.pid)
    family = [parent, *parent.children(recursive=True)]
    return Sample(
        (monotonic() - begin) / 60,
        sum(process.memory_full_info().pss for process in family) / 1e6,
        sum(process.num_fds() for process in family),
        sum(process.num_threads() for process in family),
    )


async def watch(server: Server, begin: float, until: float) -> list[Sample]:
    samples = []
    while monotonic() < until:
        samples.append(look(server, begin))
        await asyncio.sleep(WATCH_SECONDS)
    return samples


def make_versions(root: Path) -> dict[str, str]:
    """Save three proxies: the demo's, and two of the same network that reject more often. Returns name -> version."""
    loaded = load(DEMO / "proxies" / "aligned", base=None)
    for name in ("one", "two", "three"):
        save(root / name, loaded.network, base=loaded.base, training=loaded.training)
        with torch.no_grad():
            loaded.network.score.bias.sub_(1.5)
    return {name: load(root / name, base=None).version for name in ("one", "two", "three")}


async def soak(server: Server, options: Options, root: Path, versions: dict[str, str]) -> Any:
    """The metrics of a run on a healthy server."""
    rng = random.Random(options.seed)
    _, _, combinations = split_combinations(0)
    prompts = [prompt.text for prompt in islice(draw_prompts(combinations, rng), options.prompts)]
    all_questions = list(questions(prompts, options.seeds, rng))
    # uvicorn closes idle connections after 5 s; a request sent at that moment is not lost by the server.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(300)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as http:
        idle = Crowd(http, all_questions, {})
        for name in versions:
            await idle.change("post", "/proxies", name, {"name": name, "path": name})
        await ask_quietly(idle, versions)
        for name in versions:
            await idle.change("delete", f"/proxies/{name}", name)
        await idle.change("post", "/proxies", MOVING, {"name": MOVING, "path": "one"})

        crowd, begin = Crowd(http, all_questions, idle.right), monotonic()
        until = begin + options.minutes * 60
        watcher = asyncio.create_task(watch(server, begin, until))
        clients = [random.Random(f"{options.seed} {i}") for i in range(options.clients)]
        await asyncio.gather(
            *(crowd.client(entry, until) for entry in clients),
            crowd.operator(rng, root, list(versions), until),
            *(
                Attacker(http, server.url, crowd.record).run(random.Random(f"hostile {i}"), until)
                for i in range(options.hostile)
            ),
        )
        samples = await watcher

        after = Crowd(http, all_questions, {})
        await ask_quietly(after, {})
        memory = look(server, begin).megabytes
        async with http.get("/proxies") as reply:
            left = (await reply.json())["data"]
    return {
        "options": {key: value for key, value in asdict(options).items() if key != "output"},
        "answers_known": len(idle.right),
        "requests": {kind: dict(entry) for kind, entry in sorted(crowd.record.outcomes.items())},
        "details": crowd.record.details,
        "seconds": {
            kind: {"median": median(entry), "p99": quantiles(entry, n=100)[98]}
            for kind, entry in sorted(crowd.record.seconds.items())
            if len(entry) > 1
        },
        "changes": dict(crowd.record.changes),
        "answers_by_version": dict(crowd.record.versions),
        "feedback_acknowledged": crowd.record.feedback,
        "megabytes_afterwards": memory,
        "samples": [asdict(entry) for entry in samples],
        **{unit: trend(samples, unit) for unit in ("megabytes", "files", "threads")},
        "wrong_afterwards": sum(text != idle.right[key] for key, text in after.right.items()),
        "proxies_afterwards": sorted([p["name"], p["state"], p["in_flight"]] for p in left),
    }


def trend(samples: Sequence[Sample], unit: str) -> dict[str, float]:
    """Linear regression over the second half, after warm-up: first, last, and the slope per minute."""
    warm = samples[len(samples) // 2 :]
    minutes, values = (
        [sample.minutes for sample in warm],
        [float(getattr(sample, unit)) for sample in warm],
    )
    slope, intercept = linear_regression(minutes, values)
    residuals = [y - intercept - slope * x for x, y in zip(minutes, values, strict=True)]
    spread = sum((x - mean(minutes)) ** 2 for x in minutes)
    error = (sum(r * r for r in residuals) / max(1, len(warm) - 2) / spread) ** 0.5
    return {"first": values[0], "last": values[-1], "slope": slope, "standard_error": error}


def main(options: Options) -> int:
    with tempfile.TemporaryDirectory() as directory:
        root, database = Path(directory) / "proxies", Path(directory) / "feedback.db"
        versions = make_versions(root)
        demo = {name: DEMO / "proxies" / name for name in FIXED}
        flags: list[str | Path] = ["--proxy-root", root, "--feedback", database]
        flags += ["--dtype", "float32"]
        with serve(get_model("demo"), "assent", demo, flags) as server:
            figures = asyncio.run(soak(server, options, root, versions))
            process, begin = psutil.Process(server.pid), monotonic()
            process.terminate()
            figures["exit_status"] = process.wait(60)
            figures["seconds_to_end"] = monotonic() - begin
        with create_engine(f"sqlite:///{database}").connect() as connection:
            rows = connection.execute(
                text("SELECT count(*) FROM preferences WHERE source = 'person'")
            )
            figures["feedback_kept"] = rows.scalar_one()
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    show(figures)
    bad = sum(
        counts.get("wrong", 0) + counts.get("lost", 0) for counts in figures["requests"].values()
    )
    lost = figures["feedback_acknowledged"] - figures["feedback_kept"]
    # Caches fill for some minutes; `first` is in the middle of the run.
    grown = figures["megabytes_afterwards"] - figures["megabytes"]["first"] > MAX_GROWTH
    ended = figures["exit_status"] == 0
    return int(bool(bad or lost or grown or figures["wrong_afterwards"] or not ended))


def show(figures: Any) -> None:
    """Print the table for the docs and the other metrics."""
    outcomes = ("right", "refused", "cancelled", "wrong", "lost")
    lines = [["requests", *outcomes, "median s", "p99 s"]]
    lines.append(["---"] * len(lines[0]))
    for kind, counts in figures["requests"].items():
        times = figures["seconds"].get(kind, {})
        cells = [str(counts.get(outcome, 0)) for outcome in outcomes]
        lines.append([kind, *cells, *(f"{value:.2f}" for value in times.values())])
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    for unit in ("megabytes", "files", "threads"):
        trend_values = figures[unit]
        print(
            f"{unit}: {trend_values['first']:.0f} to {trend_values['last']:.0f}, "
            f"{trend_values['slope']:+.3f} ± {trend_values['standard_error']:.3f} a minute"
        )
    for key in ("changes", "answers_by_version", "feedback_acknowledged", "feedback_kept"):
        print(f"{key}: {figures[key]}")
    for key in (
        "megabytes_afterwards",
        "exit_status",
        "seconds_to_end",
        "wrong_afterwards",
        "proxies_afterwards",
    ):
        print(f"{key}: {figures[key]}")
    print("\n".join(figures["details"]))


if __name__ == "__main__":
    sys.exit(main(read_options(Options, __doc__)))
