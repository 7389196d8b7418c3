"""Tables and curves of the learning benchmark."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import pyplot

from benchmarks.learning.users import HOSTILE, TASTES
from benchmarks.toy_prompts import mean

matplotlib.use("Agg")


def of_taste(rows: Sequence[dict[str, Any]], taste: str) -> list[dict[str, Any]]:
    """For each number of verdicts: the win rate over users with its standard error, and more."""
    stages = []
    for verdicts in dict.fromkeys(row["verdicts"] for row in rows):
        user_rows = [row for row in rows if row["taste"] == taste and row["verdicts"] == verdicts]
        stages.append({
            "verdicts": verdicts,
            "win_rate": mean([win for row in user_rows for win in row["wins"]]),
            "flawed": fmean(flawed for row in user_rows for flawed in row["flawed"]),
            "sent": fmean(row["sent"] for row in user_rows),
            "users": len(user_rows),
            "with_proxy": sum(row["has_proxy"] for row in user_rows),
        })  # fmt: skip
    return stages


def markdown(figures: dict[str, Any]) -> str:
    """The tables for the docs."""
    verdicts = [stage["verdicts"] for stage in of_taste(figures["users"], HOSTILE)]
    lines = ["| taste | " + " | ".join(f"{n} verdicts" for n in verdicts) + " |"]
    lines.append("|---" * (len(verdicts) + 1) + "|")
    for taste in (*TASTES, HOSTILE):
        cells = [
            f"{rate:.1%} ± {error:.1%} ({stage['with_proxy']}/{stage['users']})"
            for stage in of_taste(figures["users"], taste)
            for rate, error in (stage["win_rate"],)
        ]
        lines.append(f"| {taste} | {' | '.join(cells)} |")
    if "best_of" in figures:
        lines += ["", "| way to answer | requests before | gold win rate | tokens a request |"]
        lines.append("|---" * 4 + "|")
        for row in figures["best_of"]:
            rate, error = row["win_rate"]
            line = f"{row['requests']} | {rate:.1%} ± {error:.1%} | {row['tokens']:.0f}"
            lines.append(f"| {row['way']} | {line} |")
    return "\n".join(lines) + "\n"


def plot(figures: dict[str, Any], path: Path) -> None:
    """Win rate by verdicts for each taste, and by requests for the proxy that replaces best of 8."""
    best_of = figures.get("best_of")
    figure, axes = pyplot.subplots(
        1, 2 if best_of else 1, figsize=(10 if best_of else 5.5, 4), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    left = axes[0][0]
    for taste in TASTES:
        rows = of_taste(figures["users"], taste)
        rates, errors = zip(*(row["win_rate"] for row in rows), strict=True)
        draw(left, [row["verdicts"] for row in rows], rates, errors, taste)
    left.set_xlabel("verdicts of a user")
    left.set_ylabel("% won over the frozen LLM, by the user's taste")
    left.set_title("A proxy of one's own")
    left.legend()
    if best_of:
        right = axes[0][1]
        rows = [row for row in best_of if row["way"] == "quick"]
        rates, errors = zip(*(row["win_rate"] for row in rows), strict=True)
        draw(right, [row["requests"] for row in rows], rates, errors, "proxy alone, one sample")
        rate, error = best_of[-1]["win_rate"]
        right.axhspan(100 * (rate - error), 100 * (rate + error), color="grey", alpha=0.3)
        right.axhline(100 * rate, color="grey", label="best of 8")
        right.set_xlabel("requests with best of 8")
        right.set_title("A proxy of the judge's verdicts, by the gold scorer")
        right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(
    axes: Any, x: Sequence[int], rates: Sequence[float], errors: Sequence[float], label: str
) -> None:
    percent = ([100 * value for value in values] for values in (rates, errors))
    y, y_error = percent
    axes.errorbar(x, y, yerr=y_error, marker="o", capsize=2, label=label)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(x, [str(value) for value in x])
    axes.axhline(50, color="black", linewidth=0.5)
