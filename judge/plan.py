"""Proxy, best of N, or both? Measures what each wins and costs on a running server, and chooses for a budget.

    python -m judge.plan --prompts prompts.jsonl --proxies aligned --max-seconds 0.5 --output runs/plan
    python -m judge.plan --measured runs/plan/plan.json --max-tokens 400

`judge.measure` defines the figures. The grader is a function of yours (`--grader`), or else the server's own judge. The
best of N that a judge has chosen looks better to the same judge than it is; a function, or a judge of another kind
(`--grader-kind`), has no such bias. The choice for a budget: the strategy with the highest win rate within it; of
those within a standard error of that, the cheapest.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from judge.client import error_message
from judge.measure import Measured, MeasureOptions, Strategy, load_grader, measure
from judge.messages import Message
from judge.options import Positive, read_options, refuse_existing
from judge.rows import read_rows

PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Options(MeasureOptions):
    """What to measure, and the budget."""

    measured: Path | None = None
    """`plan.json` of an earlier run, to choose from. Default: measure."""
    prompts: str | None = None
    """A file of JSON lines or Parquet with `prompt`, a text or chat messages, or a data set's name."""
    output: Path = Path("runs/plan")
    """Directory for `plan.json`."""
    overwrite: bool = False
    """Replace an existing `plan.json`."""
    max_seconds: Positive | None = None
    """Budget: limit of the 95th percentile of the latency, in seconds."""
    max_tokens: Positive | None = None
    """Budget: limit of the mean number of tokens an answer: prompt, samples and judgments together."""


def choose(
    measured: Sequence[Measured], max_seconds: float | None, max_tokens: float | None
) -> Measured | None:
    """The choice for the budget, as the module's docstring defines it; None where nothing is within it."""
    within = [
        row
        for row in measured
        if (max_seconds is None or row.seconds_95 <= max_seconds)
        and (max_tokens is None or row.tokens <= max_tokens)
    ]
    if not within:
        return None
    best = max(within, key=lambda row: row.win_rate)
    as_good = [row for row in within if row.win_rate >= best.win_rate - best.win_rate_se]
    return min(as_good, key=lambda row: row.tokens if max_seconds is None else row.seconds)


def is_dominated(row: Measured, measured: Sequence[Measured]) -> bool:
    """Whether another strategy wins at least as much, costs no more in time or tokens, and differs in one of them."""

    def figures(row: Measured) -> tuple[float, float, float]:
        return -row.win_rate, row.seconds, row.tokens

    return any(
        all(a <= b for a, b in zip(figures(other), figures(row), strict=True))
        and figures(other) != figures(row)
        for other in measured
    )


def write_measured(path: Path, measured: Sequence[Measured]) -> None:
    """The strategy is called `way` in the file, as it has always been."""
    rows = [asdict(row) for row in measured]
    text = json.dumps([{"way": row.pop("strategy"), **row} for row in rows], indent=1)
    path.write_text(text + "\n")


def read_measured(path: Path) -> list[Measured]:
    """Raises ValueError where `write_measured` did not write the file."""
    try:
        rows = json.loads(path.read_bytes())
        return [Measured(Strategy(**row.pop("way")), **row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no plan.json of an earlier run: {error}") from None


def show(measured: Sequence[Measured], chosen: Measured | None) -> None:
    table = Table("", "strategy", "win rate", "seconds", "95 %", "tokens", "")
    for row in measured:
        table.add_row(
            "→" if row == chosen else "",
            row.strategy.name,
            f"{row.win_rate:.1%} ± {row.win_rate_se:.1%}",
            f"{row.seconds:.3f}",
            f"{row.seconds_95:.3f}",
            f"{row.tokens:.0f}",
            "dominated" if is_dominated(row, measured) else "",
        )
    console = Console()
    console.print(table)
    if chosen is None:
        console.print("Nothing is within the budget: raise it, or take a shorter answer.")


def read_prompts(options: Options) -> list[list[Message]]:
    """Raises SourceError as `judge.rows.read_rows`."""
    assert options.prompts is not None
    rows = read_rows(
        options.prompts, ("prompt",), options, lambda row: row["prompt"], options.num_prompts
    )
    return [prompt for _, prompt in rows]


def main(options: Options) -> None:
    if options.measured is not None:
        measured = read_measured(options.measured)
    elif options.prompts is not None:
        names, source = (PLAN_FILE,), options.prompts
        refuse_existing(options.output, names, source, overwrite=options.overwrite)
        if options.grader is not None:
            load_grader(
                options.grader
            )  # a wrong name fails before the server is asked for anything
        prompts = read_prompts(options)
        measured = asyncio.run(measure(options, prompts))
        options.output.mkdir(parents=True, exist_ok=True)
        write_measured(options.output / PLAN_FILE, measured)
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
        sys.exit(f"error: the server refuses: {error_message(error.response)}")
    except (ValueError, OSError, httpx.TransportError) as error:
        sys.exit(f"error: {error}")
