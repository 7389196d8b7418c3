"""The tables for the docs. What is not measured yet is left empty."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.peers.plan import ORACLE
from benchmarks.peers.rows import DECODING, SERVING, Decoding, Serving
from benchmarks.peers.setting import N

Row = dict[str, Any]
Cells = dict[str, str]
"""By the head of the column."""
TITLES = {"toy": "The toy data", "smollm2": "SmolLM2-135M-Instruct"}


def markdown(figures: Row) -> str:
    parts = ["# Beside its peers: all figures", "Written by `python -m benchmarks.peers`."]
    for name, world in figures["worlds"].items():
        parts.append(
            f"## {TITLES[name]}\n\n{world['prompts']} prompts, or the first of them; wins are against {N} plain "
            "answers to each, ± the standard error over prompts. Seconds a request are medians of rounds in which all "
            f"rows have their turn; ratios to best of {N} are medians [range] of those within a round."
        )
        parts += _rows(SERVING, world["rows"], _serving)
        parts.append(f"The grader itself chooses among {N}: {_share(world[ORACLE]['wins'])}.")
        decoded = _rows(DECODING, world["rows"], _decoding)
        if decoded:
            parts += ["In transformers:", *decoded]
        if world["reward"]:
            trained = "{pairs:,} pairs, {train_cpu_seconds:.0f} CPU seconds".format(
                **world["reward"]
            )
            parts.append(f"Their reward: {trained} of training.")
    setup = [
        {
            "package": name,
            "seconds": f"{found['seconds']:.0f}" if "seconds" in found else "",
            "MB": f"{found['megabytes']:.0f}",
        }
        for name, found in figures["setup"].items()
    ]
    return "\n\n".join([*parts, "## Setting up", table(setup)]) + "\n"


def table(rows: Sequence[Cells]) -> str:
    """With a column for each head of any row."""
    longest = max(rows, key=len)
    heads = [*longest, *dict.fromkeys(head for row in rows for head in row if head not in longest)]
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(
    known: Mapping[str, Serving] | Mapping[str, Decoding],
    rows: Mapping[str, Row],
    cells: Callable[[Row], Cells],
) -> list[str]:
    """A table of the known rows that are there, if any is."""
    found = [{"": row.title} | cells(rows[name]) for name, row in known.items() if name in rows]
    return [table(found)] if found else []


def _serving(row: Row) -> Cells:
    tokens = {
        head: " / ".join("none" if n is None else f"{n:.0f}" for n in row[kind].values())
        for kind, head in (("engine", "tokens of the engine"), ("reported", "tokens reported"))
    }
    return _quality(row) | _times(row, "{} client(s)") | tokens | _text(row)


def _decoding(row: Row) -> Cells:
    passes = {
        "LLM passes a token": f"{row['llm_passes']:.2f}",
        "reward passes a token": f"{row['reward_passes']:.2f}",
    }
    return _quality(row) | passes | _times(row, "batch of {}") | _text(row)


def _quality(row: Row) -> Cells:
    return {"win rate": _share(row["wins"]), "prompts": str(row["prompts"])}


def _times(row: Row, what: str) -> Cells:
    cells = {}
    for at in row["seconds"]:
        place = what.format(at["clients"])
        cells[f"s, {place}"] = f"{at['seconds']:.3g}"
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(at["ratio"], *at["range"])
        cells[f"ratio, {place}, {at['rounds']} rounds"] = ratio
    return cells


def _text(row: Row) -> Cells:
    cells = {"words": f"{row['words']:.1f}"}
    if row["logprob"]:
        cells["log p a token"] = "{:.2f} ± {:.2f}".format(*row["logprob"])
    return cells


def _share(figure: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f} %".format(*(100 * value for value in figure))
