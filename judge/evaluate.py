"""How good is a judge? Pairs whose better response is known, put to a running server.

    python -m judge.evaluate --data rewardbench.jsonl --output runs/judged

Rows are RewardBench's, or in any other layout of `judge.layouts`: `prompt` (text or chat messages), `chosen`,
`rejected` and, where there is one, `subset`. RewardBench 2's lists are a pair for each chosen and each rejected
response. Of each subset and of all pairs it reports:

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
import os
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

from judge.layouts import PAIR, Row
from judge.messages import as_texts, check_text, text_of
from judge.options import OptionError, read_options, refuse_existing
from judge.rows import RowOptions, read_rows
from judge.sources import SourceError

API_KEY = "ASSENT_API_KEY"
FIGURES_FILE, CHART_FILE = "figures.json", "reliability.png"
PAIRS_IN_A_REQUEST = 64
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What to ask whom."""

    data: str
    """A file of JSON lines or Parquet, or a data set's name with its split after a colon."""
    output: Path
    """Directory for `figures.json` and `reliability.png`."""
    overwrite: bool = False
    """Replace these two files where they are there already."""
    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """Its key, where it wants one; none = that of the variable ASSENT_API_KEY, which no list of processes shows."""
    kind: str | None = None
    """Which of the server's judges; None = its usual one."""
    principles: tuple[str, ...] = ()
    """What to judge by; none = the server's first."""
    num_pairs: PositiveInt | None = None
    """Only the first so many."""


@dataclass(frozen=True)
class Compared:
    """A pair as /judge takes it, and where it stands."""

    row: str
    subset: str
    pair: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """What the judge said of a pair, of which the first response is known to be better."""

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


class BadAnswer(ValueError):
    """What answers is no server of Assent's."""


def read_pairs(options: Options) -> list[Compared]:
    """
    Raises:
        SourceError: no such source, no rows, or too many that are no pairs.
    """

    def compared(row: Row) -> tuple[str, dict[str, Any]]:
        responses = {
            "response_a": text_of(row["chosen"][0]),
            "response_b": text_of(row["rejected"][0]),
        }
        subset = str(row.get("subset", "all pairs"))
        check_text(subset)
        return subset, {
            "messages": as_texts(row["prompt"]),
            **responses,
        }

    rows = read_rows(options.data, PAIR, options, compared, options.num_pairs)
    found = [Compared(where, subset, pair) for where, (subset, pair) in rows]
    return found[: options.num_pairs]


async def judge(options: Options, rows: Sequence[Compared]) -> list[Judged]:
    """All pairs, some requests under way at once.

    Raises:
        httpx.HTTPStatusError: the server refuses; its answer says why.
        BadAnswer: it is no server of Assent's.
    """
    key = options.api_key or os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    settings: dict[str, Any] = {"kind": options.kind} if options.kind else {}
    if options.principles:
        settings["principles"] = list(options.principles)
    batches = [rows[i : i + PAIRS_IN_A_REQUEST] for i in range(0, len(rows), PAIRS_IN_A_REQUEST)]
    limit = asyncio.Semaphore(4)
    with tqdm(total=len(rows), unit="pair") as bar:
        async with httpx.AsyncClient(
            base_url=options.base_url, headers=headers, timeout=None
        ) as client:

            async def ask(batch: Sequence[Compared]) -> list[Judged]:
                body = {"pairs": [each.pair for each in batch]} | settings
                async with limit:
                    answer = await client.post("/judge", json=body)
                answer.raise_for_status()
                bar.update(len(batch))
                try:
                    verdicts = answer.json()["verdicts"]
                    return list(map(_judged, batch, verdicts))
                except (ValueError, KeyError, TypeError):
                    raise BadAnswer(f"{options.base_url} answers, but it does not judge") from None

            return [each for found in await asyncio.gather(*map(ask, batches)) for each in found]


def _judged(compared: Compared, verdict: dict[str, Any]) -> Judged:
    return Judged(
        compared.row,
        compared.subset,
        verdict["probability"],
        verdict["consistent"],
        verdict["winner"] == "tie",
    )


def reason_of(answer: httpx.Response) -> str:
    """What the server says, in one line."""
    try:
        return str(answer.json()["error"]["message"]).replace("\n", " ")
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason_phrase}"


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """The rates of some pairs, as the module's docstring defines them."""
    n = len(judged)
    accuracy = fmean(each.correct for each in judged)
    by_row: defaultdict[str, list[float]] = defaultdict(list)
    for each in judged:
        by_row[each.row].append(each.correct)
    return {
        "pairs": n,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n),
        "rows": len(by_row),
        "accuracy_by_row": fmean(min(correct) for correct in by_row.values()),
        "consistency": fmean(each.consistent for each in judged),
        "ties": fmean(each.is_tie for each in judged),
        "ece": sum(
            len(some) / n * abs(fmean(j.correct for j in some) - fmean(j.confidence for j in some))
            for some in in_bins(judged)
        ),
    }


def in_bins(judged: Sequence[Judged]) -> list[list[Judged]]:
    """By confidence, from 1/2 to 1; bins without a pair are left out."""
    bins: list[list[Judged]] = [[] for _ in range(BINS)]
    for each in judged:
        bins[min(BINS - 1, int((each.confidence - 0.5) * 2 * BINS))].append(each)
    return [some for some in bins if some]


def draw_reliability(by_subset: dict[str, list[Judged]], path: Path) -> None:
    """Accuracy over confidence; on the diagonal a judge is as often right as it says."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    for subset, judged in by_subset.items():
        bins = in_bins(judged)
        confidences = [fmean(j.confidence for j in some) for some in bins]
        accuracies = [fmean(j.correct for j in some) for some in bins]
        label = subset.replace("$", r"\$")  # which begins a formula
        axes.plot(confidences, accuracies, "o-", label=label)
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
    for each in judged:
        by_subset[each.subset].append(each)
    if len(by_subset) > 1:
        by_subset["all pairs"] = judged
    found = {subset: figures(some) for subset, some in by_subset.items()}
    (options.output / FIGURES_FILE).write_text(json.dumps(found, indent=2) + "\n")
    draw_reliability(by_subset, options.output / CHART_FILE)
    show(found)


if __name__ == "__main__":
    try:
        main(read_options(Options, __doc__))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except httpx.HTTPStatusError as error:
        sys.exit(f"error: the server refuses: {reason_of(error.response)}")
    except (
        SourceError,
        OptionError,
        BadAnswer,
        OSError,
        UnicodeError,
        httpx.HTTPError,
        httpx.InvalidURL,
    ) as error:
        sys.exit(f"error: {error or type(error).__name__}")
