"""How good is a judge? Pairs whose better response is known, put to a running server.

    python -m judge.evaluate --data rewardbench.jsonl --output runs/judged

Rows are RewardBench's: `prompt` (text or chat messages), `chosen`, `rejected` and, where there is one, `subset`. Of
each subset and of all pairs it reports:

- accuracy: share of pairs in which the judge's probability prefers `chosen`; exactly 1/2 counts half.
- consistency: share of pairs in which both orders prefer the same response.
- ties: share of pairs without a winner.
- ECE, the expected calibration error (Guo et al., arXiv 1706.04599): Σ_b n_b / N · |accuracy_b − confidence_b| over ten
  bins of equal width; confidence is the greater of p and 1 − p.
"""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import tyro
from datasets import load_dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PAIRS_IN_A_REQUEST = 64
BINS = 10


@dataclass(frozen=True)
class Options:
    """What to ask whom."""

    data: str
    """JSON lines or Parquet, or a data set's name with its split after a colon."""
    output: Path
    """Directory for `figures.json` and `reliability.png`."""
    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """Its key, where it wants one."""
    kind: str | None = None
    """Which of the server's judges; None = its usual one."""
    principles: tuple[str, ...] = ()
    """What to judge by; none = the server's first."""
    num_pairs: int | None = None
    """Only the first so many."""


@dataclass(frozen=True)
class Judged:
    """What the judge said of a pair, of which the first response is known to be better."""

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


class BadRow(ValueError):
    """A row that is no pair; the message names it."""


def read_pairs(source: str) -> list[dict[str, Any]]:
    """Rows as /judge takes pairs, with their subset.

    Raises:
        BadRow: naming the row and what is wrong with it.
        OSError: no such source.
    """
    rows = []
    for number, row in enumerate(_load(source), start=1):
        where = f"{source}, row {number}"
        for field in ("prompt", "chosen", "rejected"):
            if row.get(field) is None:
                raise BadRow(f"{where}: the field {field!r} is missing; found {sorted(row)}")
        prompt = row["prompt"]
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        responses = {"response_a": _text(row["chosen"]), "response_b": _text(row["rejected"])}
        rows.append({"subset": str(row.get("subset", "all pairs")), "pair": asked | responses})
    return rows


def _load(source: str) -> Any:
    path = Path(source)
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=source, split="train")
    if path.suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=source, split="train")
    name, _, split = source.partition(":")
    return load_dataset(name, split=split or "train")


def _text(response: Any) -> str:
    """A response as text, or as the messages that end with it."""
    return response if isinstance(response, str) else response[-1]["content"]


async def judge(options: Options, rows: Sequence[dict[str, Any]]) -> list[Judged]:
    """All pairs, some requests under way at once.

    Raises:
        httpx.HTTPStatusError: the server refuses; its answer says why.
    """
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    settings: dict[str, Any] = {"kind": options.kind} if options.kind else {}
    if options.principles:
        settings["principles"] = list(options.principles)
    batches = [rows[i : i + PAIRS_IN_A_REQUEST] for i in range(0, len(rows), PAIRS_IN_A_REQUEST)]
    limit = asyncio.Semaphore(4)
    with tqdm(total=len(rows), unit="pair") as bar:
        async with httpx.AsyncClient(
            base_url=options.base_url, headers=headers, timeout=None
        ) as client:

            async def ask(batch: Sequence[dict[str, Any]]) -> list[Judged]:
                body = {"pairs": [row["pair"] for row in batch]} | settings
                async with limit:
                    answer = await client.post("/judge", json=body)
                answer.raise_for_status()
                bar.update(len(batch))
                return [
                    Judged(
                        row["subset"],
                        verdict["probability"],
                        verdict["consistent"],
                        verdict["winner"] == "tie",
                    )
                    for row, verdict in zip(batch, answer.json()["verdicts"], strict=True)
                ]

            return [each for found in await asyncio.gather(*map(ask, batches)) for each in found]


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """The rates of some pairs, as the module's docstring defines them."""
    n = len(judged)
    accuracy = fmean(each.correct for each in judged)
    return {
        "pairs": n,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / n),
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
        axes.plot(
            confidences, [fmean(j.correct for j in some) for some in bins], "o-", label=subset
        )
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def show(by_subset: dict[str, dict[str, float]]) -> None:
    table = Table("subset", "pairs", "accuracy", "consistency", "ties", "ECE")
    for subset, row in by_subset.items():
        table.add_row(
            subset,
            f"{row['pairs']:.0f}",
            f"{row['accuracy']:.1%} ± {row['accuracy_se']:.1%}",
            f"{row['consistency']:.1%}",
            f"{row['ties']:.1%}",
            f"{row['ece']:.3f}",
        )
    Console().print(table)


def main(options: Options) -> None:
    rows = read_pairs(options.data)[: options.num_pairs]
    judged = asyncio.run(judge(options, rows))
    by_subset: defaultdict[str, list[Judged]] = defaultdict(list)
    for each in judged:
        by_subset[each.subset].append(each)
    if len(by_subset) > 1:
        by_subset["all pairs"] = judged
    found = {subset: figures(some) for subset, some in by_subset.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    draw_reliability(by_subset, options.output / "reliability.png")
    show(found)


if __name__ == "__main__":
    import sys

    try:
        main(tyro.cli(Options, description=__doc__))
    except httpx.HTTPStatusError as error:
        sys.exit(f"error: the server refuses: {error.response.text}")
    except (BadRow, OSError, httpx.TransportError) as error:
        sys.exit(f"error: {error}")
