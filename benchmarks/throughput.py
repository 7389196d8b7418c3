"""Tokens per second with a proxy and without, over HTTP: `python -m benchmarks.throughput --models demo`.

One Assent server answers both kinds of requests: without a proxy ("plain") and with one ("aligned"). A batch without
proxied rows goes to vLLM's own sampler unchanged. With `--stock` vLLM's own server runs beside it with the same
settings and gets the same requests. The kinds alternate in random order within each round, so that slow drift of the
machine affects all. A run's clients send one request after another; all requests have the same length and ignore the
end of turn.

A ratio above 1 means that proxied serving is faster. `ratio` is that of the medians; the quartiles are those of the
ratios within each round.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

import aiohttp
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.engines import Server, serve
from benchmarks.figures import write_figures
from benchmarks.models import Model, ModelName, get_model
from judge.options import read_options

Kind = Literal["stock", "plain", "aligned"]
ShapeName = Literal["prompt-heavy", "decode-heavy"]
SamplingName = Literal[
    "top_p 1", "top_p 0.95", "top_k 20, top_p 0.95", "T 0.3, top_p 0.95", "greedy"
]

PROXY = "proxy"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[ModelName, ...] = ("demo", "large")
    """demo: 3.5 M parameters, vocabulary 1454; large: 0.5 B, vocabulary 151,936, random weights."""
    concurrency: tuple[int, ...] = (1, 8, 64)
    """Concurrent clients."""
    shapes: tuple[ShapeName, ...] = ("prompt-heavy", "decode-heavy")
    """Whether the prompt or the answer is long; `SHAPES` has the lengths."""
    samplings: tuple[SamplingName, ...] = ("top_p 1", "top_p 0.95", "top_k 20, top_p 0.95")
    """Sampling parameters; the temperature is 1 unless stated."""
    rounds: int = 5
    """Rounds, each with one run of every kind."""
    seconds: float = 2.0
    """Approximate minimum duration of a run."""
    stock: bool = False
    """Measure vLLM's own server too."""
    seeded: bool = False
    """Give every request a seed."""
    output: Path | None = None
    """A JSON file for the metrics, rewritten after every case."""


@dataclass(frozen=True)
class Shape:
    """Tokens of every request."""

    prompt: int
    answer: int


SHAPES: dict[tuple[ModelName, ShapeName], Shape] = {
    ("demo", "prompt-heavy"): Shape(512, 32),
    ("demo", "decode-heavy"): Shape(16, 128),
    ("large", "prompt-heavy"): Shape(128, 4),
    ("large", "decode-heavy"): Shape(8, 16),
}
SAMPLINGS: dict[SamplingName, dict[str, Any]] = {  # 0: a model's own generation config may set one
    "top_p 1": {"top_p": 1.0, "top_k": 0},
    "top_p 0.95": {"top_p": 0.95, "top_k": 0},
    "top_k 20, top_p 0.95": {"top_p": 0.95, "top_k": 20},
    "T 0.3, top_p 0.95": {"temperature": 0.3, "top_p": 0.95, "top_k": 0},
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0},
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: ModelName
    shape: ShapeName
    concurrency: int
    sampling: SamplingName


def prompts(model: Model, length: int, count: int) -> list[str]:
    """Random texts of `length` tokens, or approximately that many if the tokenizer merges neighbours."""
    rng = random.Random(length)
    if model.num_words:
        return [
            " ".join(f"t{rng.randrange(2, model.num_words)}" for _ in range(length))
            for _ in range(count)
        ]
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    return [tokenizer.decode(rng.choices(ids, k=length)) for _ in range(count)]


def bodies(case: Case, shape: Shape, texts: Sequence[str], kind: Kind, seeded: bool) -> list[bytes]:
    """The encoded requests of one run."""
    model = f"{case.model}:{PROXY}" if kind == "aligned" else case.model
    common = {"model": model, "temperature": 1.0, "max_tokens": shape.answer, "ignore_eos": True}
    return [
        json.dumps(
            {"messages": [{"role": "user", "content": text}]}
            | common
            | SAMPLINGS[case.sampling]
            | ({"seed": index} if seeded else {})
        ).encode()
        for index, text in enumerate(texts)
    ]


class Run(NamedTuple):
    """Totals of all requests of one run."""

    seconds: float
    prompt_tokens: int
    answer_tokens: int


async def run(server: Server, requests: Sequence[bytes], concurrency: int) -> Run:
    """Send all requests, `concurrency` at a time."""
    waiting = iter(requests)
    connector = aiohttp.TCPConnector(limit=concurrency)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        base_url=server.url,
        headers=headers,
        connector=connector,
        timeout=aiohttp.ClientTimeout(3600),
        raise_for_status=True,
    ) as http:

        async def client() -> list[dict[str, int]]:
            usages = []
            for body in waiting:
                async with http.post("/v1/chat/completions", data=body) as reply:
                    usages.append((await reply.json())["usage"])
            return usages

        start = time.perf_counter()
        clients = await asyncio.gather(*(client() for _ in range(concurrency)))
        seconds = time.perf_counter() - start
    usages = [usage for client in clients for usage in client]
    return Run(
        seconds,
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


def measure(case: Case, model: Model, servers: dict[Kind, Server], options: Options) -> Any:
    """The metrics of one row."""
    shape = SHAPES[case.model, case.shape]
    kinds = list(servers)

    def once(kind: Kind, texts: Sequence[str]) -> Run:
        requests = bodies(case, shape, texts, kind, options.seeded)
        return asyncio.run(run(servers[kind], requests, case.concurrency))

    texts = prompts(model, shape.prompt, case.concurrency)
    warm = min(once(kind, texts).seconds for kind in kinds)
    waves = max(1, math.ceil(options.seconds / warm))
    texts = prompts(model, shape.prompt, case.concurrency * waves)
    runs: dict[Kind, list[float]] = {kind: [] for kind in kinds}  # tokens per second
    for number in range(options.rounds):
        # Alternating the direction would run the last kind twice in a row, on warm caches.
        for kind in random.Random(number).sample(kinds, len(kinds)):
            seconds, prompt_tokens, tokens = once(kind, texts)
            assert tokens == len(texts) * shape.answer, "no answer ends early"
            runs[kind].append(tokens / seconds)
    figures: dict[str, Any] = asdict(case) | {
        "prompt_tokens": round(prompt_tokens / len(texts)),  # with the chat template's
        "answer_tokens": shape.answer,
        "requests_per_run": len(texts),
        "seeded": options.seeded,
        "tokens_per_second": runs,
        "medians": {kind: median(values) for kind, values in runs.items()},
        "aligned_over_plain": compare(runs["aligned"], runs["plain"]),
    }
    if "stock" in runs:
        figures["plain_over_stock"] = compare(runs["plain"], runs["stock"])
        figures["aligned_over_stock"] = compare(runs["aligned"], runs["stock"])
    return figures


def compare(speeds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Ratios of speeds."""
    ratios = [a / b for a, b in zip(speeds, baseline, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    return {
        "ratio": median(speeds) / median(baseline),
        "paired_median": middle,
        "paired_quartile_low": low,
        "paired_quartile_high": high,
        "paired_min": min(ratios),
        "paired_max": max(ratios),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for the docs."""
    head = ["model", "prompt + answer", "clients", "sampling", "plain", "aligned", "ratio"]
    head += ["paired ratios: median [quartiles]"]
    has_stock = any("stock" in row["medians"] for row in rows)
    head += ["stock vLLM", "plain / stock"] if has_stock else []
    lines = [head, ["---"] * len(head)]
    for row in rows:
        medians, ratio = row["medians"], row["aligned_over_plain"]
        cells = [row["model"], f"{row['prompt_tokens']} + {row['answer_tokens']}"]
        cells += [str(row["concurrency"]), row["sampling"]]
        cells += [f"{medians['plain']:.4g}", f"{medians['aligned']:.4g}", f"{ratio['ratio']:.2f}"]
        cells += [
            f"{ratio['paired_median']:.2f} "
            f"[{ratio['paired_quartile_low']:.2f}, {ratio['paired_quartile_high']:.2f}]"
        ]
        if has_stock:
            cells += [f"{medians['stock']:.4g}", f"{row['plain_over_stock']['ratio']:.2f}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measure_model(
    name: ModelName, options: Options, report: Callable[[dict[str, Any]], None]
) -> None:
    """All cases of one model, on servers that run during all of them."""
    model = get_model(name)
    with ExitStack() as stack:
        assent = stack.enter_context(serve(model, "assent", {PROXY: model.proxy}))
        servers: dict[Kind, Server] = {"plain": assent, "aligned": assent}
        if options.stock:
            servers = {"stock": stack.enter_context(serve(model, "stock", {})), **servers}
        cases = product(options.shapes, options.concurrency, options.samplings)
        for shape, concurrency, sampling in cases:
            report(measure(Case(name, shape, concurrency, sampling), model, servers, options))


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        case = ", ".join(str(row[key]) for key in ("model", "shape", "concurrency", "sampling"))
        console.print(f"{case}: {row['aligned_over_plain']['ratio']:.2f}", highlight=False)
        write_figures(options.output, rows)

    for name in options.models:
        measure_model(name, options, report)
    print(markdown(rows))


if __name__ == "__main__":
    main(read_options(Options, __doc__))
