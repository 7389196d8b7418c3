"""Proxy, best of N, or both? What each wins and costs on a running server, and which fits a budget.

    python -m judge.plan --prompts prompts.jsonl --proxies aligned --max-seconds 0.5 --output runs/plan
    python -m judge.plan --measured runs/plan/plan.json --max-tokens 400

Every prompt is answered in every way, in random order, so that whatever slows the server down slows all of them. What a
way wins is its win rate against the plain LLM's answers to the same prompts, ties half: by `--grader`, a function of
yours, or else by the server's own judge. Mind that the best of N that a judge has chosen looks better to the same judge
than it is; a function, or a judge of another kind (`--grader-kind`), does not have that flaw. The fit for a budget is
the way that wins most within it; of those that are not worse by more than a standard error, the cheapest.
"""

import asyncio
import importlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import httpx
from pydantic import PositiveInt
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from judge.evaluate import API_KEY, reason_of
from judge.messages import Message, as_texts
from judge.options import Positive, Seed, read_options, refuse_existing
from judge.rows import RowOptions, read_rows

PLAN_FILE = "plan.json"
Grader = Callable[..., Sequence[float]]
"""Called with N `prompts` (lists of chat messages) and `completions` (texts); a score each, higher is better."""


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What to measure, and the budget."""

    measured: Path | None = None
    """`plan.json` of an earlier run, to choose from; None = measure."""
    prompts: str | None = None
    """A file of JSON lines or Parquet with `prompt`, a text or chat messages, or a data set's name."""
    output: Path = Path("runs/plan")
    """Directory for `plan.json`."""
    overwrite: bool = False
    """Replace `plan.json` where it is there already."""
    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """Its key, where it wants one; none = that of the variable ASSENT_API_KEY, which no list of processes shows."""
    model: str | None = None
    """The LLM's name; None = the first that the server lists."""
    proxies: tuple[str, ...] = ()
    """Names of loaded proxies; the plain LLM is always measured."""
    best_of: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """N."""
    judge_kind: str | None = None
    """Which of the server's judges chooses; None = its usual one."""
    num_prompts: PositiveInt = 200
    """Only the first so many."""
    concurrency: PositiveInt = 1
    """Requests at once: latencies are those of such a load."""
    max_completion_tokens: PositiveInt = 256
    """Of an answer."""
    grader: str | None = None
    """`module:function`, called with N prompts (lists of chat messages) and completions (texts), returning N numbers;
    None = the server's judge."""
    grader_kind: str | None = None
    """Which of the server's judges grades; None = its usual one."""
    max_seconds: Positive | None = None
    """Budget: 95 % of the answers are to come within so many seconds."""
    max_tokens: Positive | None = None
    """Budget: tokens an answer, prompt, samples and judgments together, on average."""
    seed: Seed = 0
    """Of the order and the samples."""


@dataclass(frozen=True)
class Way:
    """To answer."""

    proxy: str | None
    best_of: int

    @property
    def name(self) -> str:
        return f"{self.proxy or 'plain'}, best of {self.best_of}"


@dataclass(frozen=True)
class Measured:
    """A way, and what it wins and costs."""

    way: Way
    win_rate: float
    win_rate_se: float
    seconds: float
    """Mean."""
    seconds_95: float
    """95 % of the answers came within."""
    tokens: float
    """Mean, of prompt, samples and judgments."""


@dataclass(frozen=True)
class _Answer:
    text: str
    seconds: float
    tokens: int


async def measure(options: Options, prompts: Sequence[list[Message]]) -> list[Measured]:
    """All ways on all prompts.

    Raises httpx.HTTPStatusError where the server refuses; its answer says why.
    """
    key = options.api_key or os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    ways = [Way(proxy, n) for proxy in (None, *options.proxies) for n in options.best_of]
    plain = Way(None, 1)
    ways = [plain, *(way for way in ways if way != plain)]
    cells = [(way, place) for way in ways for place in range(len(prompts))]
    random.Random(options.seed).shuffle(cells)
    answers: dict[tuple[Way, int], _Answer] = {}
    limit = asyncio.Semaphore(options.concurrency)
    async with httpx.AsyncClient(
        base_url=options.base_url, headers=headers, timeout=None
    ) as client:
        model = options.model or (await _asked(client.get("/v1/models")))["data"][0]["id"]
        with tqdm(total=len(cells), unit="answer") as bar:

            async def fill(way: Way, place: int) -> None:
                body = _body(options, model, way, prompts[place], place)
                async with limit:
                    start = time.monotonic()
                    found = await _asked(client.post("/v1/chat/completions", json=body))
                    seconds = time.monotonic() - start
                text = found["choices"][0]["message"]["content"] or ""
                answers[way, place] = _Answer(text, seconds, found["usage"]["total_tokens"])
                bar.update()

            # The first of each way compiles, fills caches; it is answered again.
            for way in ways:
                await fill(way, 0)
            bar.reset()
            await asyncio.gather(*(fill(*cell) for cell in cells))
        theirs = [answers[plain, place].text for place in range(len(prompts))]
        found = []
        for way in ways:
            ours = [answers[way, place] for place in range(len(prompts))]
            wins = await _wins(options, client, prompts, [each.text for each in ours], theirs)
            found.append(_measured(way, ours, wins))
    return found


def _body(
    options: Options, model: str, way: Way, messages: list[Message], place: int
) -> dict[str, Any]:
    # Every way has samples of its own: the first of eight is not to be the plain answer.
    seed = options.seed + 1_000_000 * place + 1000 * (way.best_of + 100 * (way.proxy is not None))
    alignment: dict[str, Any] = {"best_of": way.best_of}
    if way.proxy:
        alignment["proxy"] = way.proxy
    if way.best_of > 1 and options.judge_kind:
        alignment["judge"] = {"kind": options.judge_kind}
    return {
        "model": model,
        "messages": messages,
        "max_tokens": options.max_completion_tokens,
        "seed": seed,
        "alignment": alignment,
    }


def _measured(way: Way, answers: Sequence[_Answer], wins: Sequence[float]) -> Measured:
    mean, n = fmean(wins), len(wins)
    error = math.sqrt(sum((win - mean) ** 2 for win in wins) / max(1, n - 1) / n)
    seconds = [answer.seconds for answer in answers]
    return Measured(
        way,
        mean,
        error,
        fmean(seconds),
        quantiles(seconds, n=20)[-1] if n > 1 else seconds[0],
        fmean(answer.tokens for answer in answers),
    )


async def _wins(
    options: Options,
    client: httpx.AsyncClient,
    prompts: Sequence[list[Message]],
    ours: Sequence[str],
    theirs: Sequence[str],
) -> list[float]:
    """1 where ours is better, 0 where theirs is, 1/2 where neither."""
    if options.grader is not None:
        grade = load_grader(options.grader)
        scores = [grade(prompts=list(prompts), completions=list(each)) for each in (ours, theirs)]
        return [(a > b) + 0.5 * (a == b) for a, b in zip(*scores, strict=True)]
    wins: list[float] = []
    kind = {"kind": options.grader_kind} if options.grader_kind else {}
    for start in range(0, len(prompts), 64):
        pairs = [
            {"messages": as_texts(prompt), "response_a": a, "response_b": b}
            for prompt, a, b in zip(
                *(each[start : start + 64] for each in (prompts, ours, theirs)), strict=True
            )
        ]
        found = await _asked(client.post("/judge", json={"pairs": pairs} | kind))
        wins += [{"a": 1.0, "b": 0.0, "tie": 0.5}[each["winner"]] for each in found["verdicts"]]
    return wins


async def _asked(request: Any) -> Any:
    answer = await request
    answer.raise_for_status()
    return answer.json()


def load_grader(name: str) -> Grader:
    """The function that `module:function` names. Raises ValueError where there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does
        raise ValueError(f"--grader {name!r}: expected module:function ({error})") from None


def choose(
    measured: Sequence[Measured], max_seconds: float | None, max_tokens: float | None
) -> Measured | None:
    """The fit for the budget, as the module's docstring defines it; None where nothing is within it."""
    within = [
        each
        for each in measured
        if (max_seconds is None or each.seconds_95 <= max_seconds)
        and (max_tokens is None or each.tokens <= max_tokens)
    ]
    if not within:
        return None
    best = max(within, key=lambda each: each.win_rate)
    as_good = [each for each in within if each.win_rate >= best.win_rate - best.win_rate_se]
    return min(as_good, key=lambda each: each.tokens if max_seconds is None else each.seconds)


def is_dominated(one: Measured, measured: Sequence[Measured]) -> bool:
    """Whether another wins at least as much, costs no more of either, and is not the same in all."""

    def figures(each: Measured) -> tuple[float, float, float]:
        return -each.win_rate, each.seconds, each.tokens

    return any(
        all(a <= b for a, b in zip(figures(other), figures(one), strict=True))
        and figures(other) != figures(one)
        for other in measured
    )


def read_measured(path: Path) -> list[Measured]:
    """Raises ValueError where the file is none that `main` wrote."""
    try:
        rows = json.loads(path.read_bytes())
        return [Measured(**row | {"way": Way(**row["way"])}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no plan.json of an earlier run: {error}") from None


def show(measured: Sequence[Measured], fit: Measured | None) -> None:
    table = Table("", "way", "win rate", "seconds", "95 %", "tokens", "")
    for each in measured:
        table.add_row(
            "→" if each == fit else "",
            each.way.name,
            f"{each.win_rate:.1%} ± {each.win_rate_se:.1%}",
            f"{each.seconds:.3f}",
            f"{each.seconds_95:.3f}",
            f"{each.tokens:.0f}",
            "dominated" if is_dominated(each, measured) else "",
        )
    console = Console()
    console.print(table)
    if fit is None:
        console.print("Nothing is within the budget: raise it, or take a shorter answer.")


def read_prompts(options: Options) -> list[list[Message]]:
    """Raises SourceError as `judge.rows.read_rows`."""
    assert options.prompts is not None
    read = read_rows(
        options.prompts, ("prompt",), options, lambda row: row["prompt"], options.num_prompts
    )
    return [prompt for _, prompt in read]


def main(options: Options) -> None:
    if options.measured is not None:
        measured = read_measured(options.measured)
    elif options.prompts is not None:
        names, source = (PLAN_FILE,), options.prompts
        refuse_existing(options.output, names, source, overwrite=options.overwrite)
        if options.grader is not None:
            load_grader(options.grader)  # before the server is asked for anything
        prompts = read_prompts(options)
        measured = asyncio.run(measure(options, prompts))
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(each) for each in measured], indent=1) + "\n"
        (options.output / PLAN_FILE).write_text(text)
    else:
        raise ValueError("name --prompts to measure with, or --measured to choose from")
    show(measured, choose(measured, options.max_seconds, options.max_tokens))


if __name__ == "__main__":
    try:
        main(read_options(Options, __doc__))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except httpx.HTTPStatusError as error:
        sys.exit(f"error: the server refuses: {reason_of(error.response)}")
    except (ValueError, OSError, httpx.TransportError) as error:
        sys.exit(f"error: {error}")
