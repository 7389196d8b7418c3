"""How good is a judge? Sends pairs whose better response is known to a running server.

    python -m judge.evaluate --data rewardbench.jsonl --output runs/judged

Rows are RewardBench's, or in any other layout of `judge.layouts`: `prompt` (text or chat messages), `chosen`,
`rejected` and, where there is one, `subset`. RewardBench 2's lists become a pair for each chosen and each rejected
response. It reports, for each subset and for all pairs:

- accuracy: share of pairs in which the judge's probability prefers `chosen`; exactly 1/2 counts half.
- accuracy by row, where rows have lists: share of rows whose every pair is right, as RewardBench 2 counts.
- consistency: share of pairs in which both orders prefer the same response.
- ties: share of pairs without a winner.
- ECE, the expected calibration error (Guo et al., arXiv 1706.04599): Σ_b n_b / N · |accuracy_b − confidence_b| over ten
  bins of equal width; confidence is the greater of p and 1 − p.
"""

import asyncio
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
from matplotlib.figure import Figure
from pydantic import PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from judge.client import auth_headers, error_message
from judge.layouts import PAIR, Row
from judge.messages import as_texts, check_text, text_of
from judge.options import OptionError, read_options, refuse_existing
from judge.rows import RowOptions, read_rows
from judge.sources import SourceError

FIGURES_FILE, CHART_FILE = "figures.json", "reliability.png"
PAIRS_PER_REQUEST = 64
CONCURRENCY = 4
REFUSALS = (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE)
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What to judge, and the server that judges."""

    data: str
    """A file of JSON lines or Parquet, or a data set's name with its split after a colon."""
    output: Path
    """Directory for `figures.json` and `reliability.png`."""
    overwrite: bool = False
    """Replace these two files if they exist."""
    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """The server's API key. Default: the variable ASSENT_API_KEY, which no list of processes shows."""
    kind: str | None = None
    """Which of the server's judges. Default: the server's default."""
    proxy: str | None = None
    """With `--kind proxy`: the loaded proxy that judges."""
    principles: tuple[str, ...] = ()
    """What to judge by. Default: the server's first principle."""
    num_pairs: PositiveInt | None = None
    """Number of pairs to use, from the start of the file."""


@dataclass(frozen=True)
class PairRow:
    """A pair as /judge takes it, with its place in the file."""

    row: str
    subset: str
    pair: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """The judge's result on a pair whose first response is known to be better."""

    row: str
    subset: str
    probability: float
    consistent: bool
    is_tie: bool

    @property
    def correct(self) -> float:
        return 0.5 if self.probability == 0.5 else float(self.probability > 0.5)

    @property
    def confidence(self) -> float:
        return max(self.probability, 1 - self.probability)


class NotAssentError(ValueError):
    """The server that answers is not Assent's."""


def read_pairs(options: Options) -> list[PairRow]:
    """
    Raises:
        SourceError: no such source, no rows, or too many that are no pairs.
    """

    def as_pair(row: Row) -> tuple[str, dict[str, Any]]:
        subset = str(row.get("subset", "all pairs"))
        check_text(subset)
        return subset, {
            "messages": as_texts(row["prompt"]),
            "response_a": text_of(row["chosen"][0]),
            "response_b": text_of(row["rejected"][0]),
        }

    rows = read_rows(options.data, PAIR, options, as_pair, options.num_pairs)
    pairs = [PairRow(where, subset, pair) for where, (subset, pair) in rows]
    return pairs[: options.num_pairs]


async def judge(options: Options, rows: Sequence[PairRow]) -> list[Judged]:
    """Judge all pairs, with a few requests at once. Those that the server refuses are left out and counted.

    Raises:
        httpx.HTTPStatusError: the server refuses all pairs; its response says why.
        NotAssentError: the server is not Assent's.
    """
    given = {"kind": options.kind, "proxy": options.proxy, "principles": [*options.principles]}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value}
    batches = [rows[i : i + PAIRS_PER_REQUEST] for i in range(0, len(rows), PAIRS_PER_REQUEST)]
    limit = asyncio.Semaphore(CONCURRENCY)
    headers = auth_headers(options.api_key)
    refused: list[tuple[str, httpx.Response]] = []  # row, why
    with tqdm(total=len(rows), unit="pair") as bar:
        async with httpx.AsyncClient(
            base_url=options.base_url, headers=headers, timeout=None
        ) as client:

            async def judge_batch(batch: Sequence[PairRow]) -> list[Judged]:
                body = {"pairs": [row.pair for row in batch]} | settings
                async with limit:
                    response = await client.post("/judge", json=body)
                if response.status_code in REFUSALS:
                    if len(batch) > 1:  # one of its pairs is enough
                        parts = await asyncio.gather(*(judge_batch([row]) for row in batch))
                        return [judged for part in parts for judged in part]
                    refused.append((batch[0].row, response))
                    bar.update()
                    return []
                response.raise_for_status()
                bar.update(len(batch))
                try:
                    verdicts = response.json()["verdicts"]
                    return list(map(_judged, batch, verdicts))
                except (ValueError, KeyError, TypeError):
                    raise NotAssentError(
                        f"{options.base_url} answers, but it does not judge"
                    ) from None

            results = await asyncio.gather(*map(judge_batch, batches))
    if len(refused) == len(rows):
        refused[0][1].raise_for_status()
    if refused:
        where, why = refused[0]
        print(f"left out {len(refused)} of {len(rows)} pairs that the server refuses")
        print(f"the first: {where}: {error_message(why)}")
    return [judged for batch in results for judged in batch]


def _judged(row: PairRow, verdict: dict[str, Any]) -> Judged:
    return Judged(
        row.row,
        row.subset,
        verdict["probability"],
        verdict["consistent"],
        verdict["winner"] == "tie",
    )


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """The rates of some pairs, as the module's docstring defines them."""
    n = len(judged)
    accuracy = fmean(pair.correct for pair in judged)
    by_row: defaultdict[str, list[float]] = defaultdict(list)
    for pair in judged:
        by_row[pair.row].append(pair.correct)
    return {
        "pairs": n,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n),
        "rows": len(by_row),
        "accuracy_by_row": fmean(min(correct) for correct in by_row.values()),
        "consistency": fmean(pair.consistent for pair in judged),
        "ties": fmean(pair.is_tie for pair in judged),
        "ece": sum(
            len(group) / n * abs(_accuracy(group) - _confidence(group)) for group in in_bins(judged)
        ),
    }


def in_bins(judged: Sequence[Judged]) -> list[list[Judged]]:
    """By confidence, from 1/2 to 1; bins without a pair are left out."""
    bins: list[list[Judged]] = [[] for _ in range(BINS)]
    for pair in judged:
        bins[min(BINS - 1, int((pair.confidence - 0.5) * 2 * BINS))].append(pair)
    return [pairs for pairs in bins if pairs]


def _accuracy(judged: Sequence[Judged]) -> float:
    return fmean(pair.correct for pair in judged)


def _confidence(judged: Sequence[Judged]) -> float:
    return fmean(pair.confidence for pair in judged)


def draw_reliability(by_subset: dict[str, list[Judged]], path: Path) -> None:
    """Accuracy over confidence; on the diagonal a judge is right as often as it claims."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    for subset, judged in by_subset.items():
        bins = in_bins(judged)
        label = subset.replace("$", r"\$")  # matplotlib reads $ as the start of a formula
        axes.plot([*map(_confidence, bins)], [*map(_accuracy, bins)], "o-", label=label)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def show(by_subset: dict[str, dict[str, float]]) -> None:
    has_lists = any(row["rows"] < row["pairs"] for row in by_subset.values())
    by_row = ("rows", "by row") if has_lists else ()
    table = Table("subset", "pairs", "accuracy", *by_row, "consistency", "ties", "ECE")
    for subset, row in by_subset.items():
        table.add_row(
            escape(subset),
            f"{row['pairs']:.0f}",
            f"{row['accuracy']:.1%} ± {row['accuracy_se']:.1%}",
            *((f"{row['rows']:.0f}", f"{row['accuracy_by_row']:.1%}") if has_lists else ()),
            f"{row['consistency']:.1%}",
            f"{row['ties']:.1%}",
            f"{row['ece']:.3f}",
        )
    Console().print(table)


def main(options: Options) -> None:
    files = (FIGURES_FILE, CHART_FILE)
    refuse_existing(options.output, files, options.data, overwrite=options.overwrite)
    rows = read_pairs(options)
    options.output.mkdir(parents=True, exist_ok=True)
    judged = asyncio.run(judge(options, rows))
    by_subset: defaultdict[str, list[Judged]] = defaultdict(list)
    for pair in judged:
        by_subset[pair.subset].append(pair)
    if len(by_subset) > 1:
        by_subset["all pairs"] = judged
    all_figures = {subset: figures(pairs) for subset, pairs in by_subset.items()}
    (options.output / FIGURES_FILE).write_text(json.dumps(all_figures, indent=2) + "\n")
    draw_reliability(by_subset, options.output / CHART_FILE)
    show(all_figures)


if __name__ == "__main__":
    try:
        main(read_options(Options, __doc__))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except httpx.HTTPStatusError as error:
        sys.exit(f"error: the server refuses: {error_message(error.response)}")
    except (
        SourceError,
        OptionError,
        NotAssentError,
        OSError,
        UnicodeError,
        httpx.HTTPError,
        httpx.InvalidURL,
    ) as error:
        sys.exit(f"error: {error or type(error).__name__}")
