"""Grade the served toy demo on held-out prompts over HTTP: `python -m benchmarks.demo --data runs/demo/world`.

Start the server first (`make serve DEMO=toy`). Every row is the share of prompts for which the row's answer has a
higher reference score than the frozen model's answer; ties count half. All seeds are fixed and differ between rows.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from judge.options import read_options
from training.data import read_rows
from training.toy_data import reference_scorer
from training.toy_data.grading import flaw_rates, win_rate

SEED_BLOCK = 1_000_000
CLEAR_DIFFERENCE = 2.0
"""Pairs whose reference scores differ by this much count as clearly different: their labels flip in 1.8 % of draws."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data: Path
    """Directory written by `training.world`."""
    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str = "none"
    """Its API key."""
    model: str = "assent-demo"
    """Name of the frozen model."""
    split: str = "test"
    """Held-out split: settings are chosen on `validation`, results are reported on `test`."""
    num_prompts: int = 1000
    """Prompts for each row."""
    num_best_of: int = 500
    """Prompts for the best-of-8 rows, which cost 8 answers and 14 judgments each."""
    num_pairs: int = 1000
    """Pairs for the judge."""
    concurrency: int = 32
    """Requests in flight."""
    output: Path | None = None
    """A JSON file for the metrics."""


@dataclass(frozen=True)
class Row:
    """One way to answer."""

    name: str
    model: str = ""
    """Suffix of the frozen model's name."""
    sampling: dict[str, Any] = field(default_factory=dict)
    alignment: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("frozen, again"),
    Row("frozen, top-p 0.8", sampling={"top_p": 0.8}),
    Row("frozen, top-p 0.6", sampling={"top_p": 0.6}),
    Row("frozen, greedy", sampling={"temperature": 0.0}),
    Row("proxy `aligned`", model=":aligned"),
    Row("proxy `aligned`, strength 2", model=":aligned", alignment={"strength": 2.0}),
    Row("proxy `polite`", model=":polite"),
    Row("best of 8, no proxy", alignment={"best_of": 8}),
    Row("best of 8, adaptive", alignment={"best_of": 8, "judge": {"strategy": "adaptive"}}),
    Row("proxy `aligned` + best of 8", model=":aligned", alignment={"best_of": 8}),
    Row("proxies `aligned` and `polite`", model=":aligned+polite", alignment={"strength": 1.0}),
)


async def gather(
    name: str, count: int, limit: int, ask: Callable[[int], Awaitable[Any]]
) -> list[Any]:
    """ask(0), ..., ask(count − 1), `limit` at a time, with a progress bar."""
    slots = asyncio.Semaphore(limit)
    with tqdm(total=count, desc=name) as bar:

        async def one(index: int) -> Any:
            async with slots:
                answer = await ask(index)
            bar.update()
            return answer

        return await asyncio.gather(*(one(index) for index in range(count)))


async def answers(
    client: AsyncOpenAI, options: Options, row: Row, number: int, prompts: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """The row's answers and their costs."""

    async def ask(index: int) -> Any:
        return await client.chat.completions.create(
            model=options.model + row.model,
            messages=[{"role": "user", "content": prompts[index]}],
            max_tokens=64,
            seed=SEED_BLOCK * number + 100 * index,
            extra_body={"alignment": row.alignment} if row.alignment else {},
            **row.sampling,
        )

    start = time.perf_counter()
    replies = await gather(row.name, len(prompts), options.concurrency, ask)
    seconds = time.perf_counter() - start
    stats = [r.model_extra.get("alignment") or {} for r in replies]
    proposed, rejected = (sum(r.get(key, 0) for r in stats) for key in ("proposed", "rejected"))
    costs = {
        "seconds": seconds,
        "completion_tokens": sum(r.usage.completion_tokens for r in replies),
        "acceptance_rate": 1 - rejected / proposed if proposed else None,
    }
    return [r.choices[0].message.content or "" for r in replies], costs


async def judge(options: Options) -> dict[str, Any]:
    """How often `/judge` agrees with the reference scorer, and with itself in the other order."""
    rows = read_rows(options.data / f"preferences_{options.split}.jsonl")[: options.num_pairs]
    pairs = [(r["prompt"], r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]
    headers = {"Authorization": f"Bearer {options.api_key}"}
    async with httpx.AsyncClient(base_url=options.base_url, headers=headers, timeout=600) as http:

        async def ask(index: int) -> Any:
            messages, a, b = pairs[index]
            body = {"messages": messages, "response_a": a, "response_b": b}
            return (await http.post("/judge", json=body)).raise_for_status().json()

        verdicts = await gather("judge", len(pairs), options.concurrency, ask)
    figures: dict[str, Any] = {}
    for name, least in (("all pairs", 0.0), ("clear pairs", CLEAR_DIFFERENCE)):
        chosen = []
        for (messages, a, b), verdict in zip(pairs, verdicts, strict=True):
            text = messages[-1]["content"]
            difference = reference_scorer.score(text, a) - reference_scorer.score(text, b)
            if abs(difference) >= least:
                chosen.append(((difference > 0) == (verdict["probability"] > 0.5), verdict))
        n = len(chosen)
        agreement = sum(agrees for agrees, _ in chosen) / n
        figures[name] = {
            "pairs": n,
            "agreement": agreement,
            "agreement_se": math.sqrt(agreement * (1 - agreement) / n),
            "consistency": sum(verdict["consistent"] for _, verdict in chosen) / n,
        }
    return figures


async def measure(options: Options) -> dict[str, Any]:
    prompts = [
        row["prompt"][-1]["content"]
        for row in read_rows(options.data / f"prompts_{options.split}.jsonl")[: options.num_prompts]
    ]
    client = AsyncOpenAI(
        base_url=options.base_url + "/v1", api_key=options.api_key, timeout=600, max_retries=0
    )
    frozen, _ = await answers(client, options, Row("frozen"), 1, prompts)
    figures: dict[str, Any] = {"prompts": len(prompts), "split": options.split, "rows": []}
    figures["frozen_flaw_rates"] = flaw_rates(prompts, frozen)
    for number, row in enumerate(ROWS, start=2):
        count = options.num_best_of if "best_of" in row.alignment else len(prompts)
        texts, costs = await answers(client, options, row, number, prompts[:count])
        rate, error = win_rate(prompts[:count], texts, frozen[:count])
        figures["rows"].append(
            {"name": row.name, "prompts": count, "win_rate": rate, "win_rate_se": error}
            | {"flaw_rates": flaw_rates(prompts[:count], texts)}
            | costs
        )
    figures["judge"] = await judge(options)
    return figures


def show(figures: dict[str, Any]) -> None:
    table = Table("way to answer", "prompts", "gold win rate", "flawed", "accepted", "seconds")
    for row in figures["rows"]:
        accepted = row["acceptance_rate"]
        table.add_row(
            row["name"],
            str(row["prompts"]),
            f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}",
            f"{row['flaw_rates']['any']:.1%}",
            f"{accepted:.1%}" if accepted else "",
            f"{row['seconds']:.0f}",
        )
    judged = Table("judge on", "pairs", "agrees with gold", "consistent in both orders")
    for name, row in figures["judge"].items():
        agreement = f"{row['agreement']:.1%} ± {row['agreement_se']:.1%}"
        judged.add_row(name, str(row["pairs"]), agreement, f"{row['consistency']:.1%}")
    Console().print(table, judged)


def main(options: Options) -> None:
    figures = asyncio.run(measure(options))
    show(figures)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read_options(Options, __doc__))
