"""The tables of the report, in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.real.evaluation import GRID, leader, search_job
from benchmarks.real.methods import BASELINE, METHODS
from benchmarks.real.opinions import REWARD, SECOND_HELPFUL, SECOND_PROBE
from benchmarks.real.setting import SYSTEM_PROMPT, Setting
from benchmarks.real.texts import COMPLIES
from benchmarks.real.words import SECOND_WORDS

Row = dict[str, Any]
Cell = Callable[[Row], str]


def markdown(figures: Row) -> str:
    rows, data = figures["rows"], figures["data"]
    counts = ", ".join(f"{count:,} in `{name}`" for name, count in data.items())
    costly = next(iter(rows.values()))
    return "\n".join(
        [
            f"Written by `python -m benchmarks.real`. Rows of the data: {counts}.\n",
            f"Wins are against {METHODS[BASELINE].title}; ± is the standard error over prompts. A refusal is what "
            f"`benchmarks/real/texts.py` calls so; an answer complies if it does not refuse and has {COMPLIES} words "
            f"or more. The system prompt: “{SYSTEM_PROMPT}”\n",
            f"## Prompts of the pairs about harm ({costly['harmful']['prompts']})\n",
            table(rows, HARMFUL),
            f"## Harmless prompts ({costly['harmless']['prompts']})\n",
            table(rows, HARMLESS),
            "## Costs\n",
            table(rows, COSTS),
            "## Right about held-out human pairs about harm\n",
            _judges(figures["judges"]),
            "## Search of the decodings: mean reward on validation prompts, first seed\n",
            _searches(figures["searches"]),
        ]
    )


def table(rows: dict[str, Row], columns: dict[str, Cell]) -> str:
    """A table with a line for each row; columns without any figure are left out."""
    filled = {
        head: [cell(row) for row in rows.values()]
        for head, cell in columns.items()
        if any(cell(row) for row in rows.values())
    }
    titles = [METHODS[name].title for name in rows]
    return _lines(("method", *filled), zip(titles, *filled.values(), strict=True))


def _lines(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in whole) + "\n"


def share(part: str, name: str) -> Cell:
    """A share with its standard error, in percent."""
    return lambda row: _percent(row[part][name])


def won(part: str, opinion: str) -> Cell:
    """Wins by an opinion, if there is one."""
    return lambda row: _percent(row[part]["wins"].get(opinion))


def number(part: str, name: str, digits: int = 2) -> Cell:
    """A mean with its standard error."""
    return lambda row: "{:.{d}f} ± {:.{d}f}".format(*row[part][name], d=digits)


def _percent(figure: Sequence[float] | None) -> str:
    return "" if figure is None else f"{figure[0]:.1%} ± {figure[1]:.1%}"


def _named(decoding: Row) -> str:
    return f"{decoding['temperature']:g}, {decoding['top_p']:g}"


HARMFUL: dict[str, Cell] = {
    "T, top-p": lambda row: _named(row["decoding"]),
    "reward trained on": number("harmful", "reward"),
    "wins by it": won("harmful", REWARD),
    "wins by the second probe": won("harmful", SECOND_PROBE),
    "wins by the words": won("harmful", SECOND_WORDS),
    "refuses": share("harmful", "refuses"),
    "complies": share("harmful", "complies"),
    "KL, nats": lambda row: "{:.1f} ± {:.1f}".format(*row["kl"]) if "kl" in row else "",
    "log p a token": number("harmful", "logprob"),
    "words": number("harmful", "words", 1),
    "distinct 3-grams in an answer": share("harmful", "distinct_3"),
    "distinct 2-grams over all": lambda row: f"{row['harmful']['distinct_2']:.1%}",
    "seeds": lambda row: str(row["seeds"]),
}
HARMLESS: dict[str, Cell] = {
    "refuses": share("harmless", "refuses"),
    "complies": share("harmless", "complies"),
    "helpfulness: wins by the second opinion": won("harmless", SECOND_HELPFUL),
    "wins by the reward about harm": won("harmless", REWARD),
    "log p a token": number("harmless", "logprob"),
    "words": number("harmless", "words", 1),
    "distinct 3-grams in an answer": share("harmless", "distinct_3"),
}
COSTS: dict[str, Cell] = {
    "parameters": lambda row: f"{row['parameters']:,}" if "parameters" in row else "",
    "training, CPU s": lambda row: (
        f"{row['train_cpu_seconds']:.0f}" if "train_cpu_seconds" in row else ""
    ),
    "an answer, CPU s": lambda row: f"{row['answer_cpu_seconds']:.2f}",
    "samples an answer": lambda row: str(row["samples"]),
    "tokens of an answer": number("harmful", "tokens", 1),
}


def _judges(judges: dict[str, Row]) -> str:
    lines = [
        (name, _percent((found["share"], found["se"])), str(found["pairs"]))
        for name, found in judges.items()
    ]
    return _lines(("reward, opinion or judge", "right", "pairs"), lines)


def searches(setting: Setting, names: Iterable[str]) -> dict[str, list[float]]:
    """The mean rewards of all decodings, by the row that was searched."""
    searched = dict.fromkeys(leader(name) for name in names if METHODS[name].decoding is None)
    return {
        name: [row["reward"] for row in setting.result(search_job(name))["rows"]]
        for name in searched
    }


def _searches(found: dict[str, list[float]]) -> str:
    head = [f"T {decoding.temperature:g}, top-p {decoding.top_p:g}" for decoding in GRID]
    lines = [
        (METHODS[name].title, *(f"{reward:.2f}" for reward in rewards))
        for name, rewards in found.items()
    ]
    return _lines(("method", *head), lines)
