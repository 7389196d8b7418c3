"""Figures and tables. A win counts 1 and a tie 1/2, against each of N plain answers; errors are over prompts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.peers import environments, timing
from benchmarks.peers.plan import BASELINE, FLUENCY, ORACLE, answers_job
from benchmarks.peers.rows import (
    BEST_OF,
    DECODING,
    DECODING_BEST_OF,
    SERVING,
    decoding_rows,
    serving_rows,
)
from benchmarks.peers.setting import N, Setting
from benchmarks.peers.worlds import prompts_of, world_of
from benchmarks.toy_prompts import mean

Row = dict[str, Any]


def write(settings: Sequence[Setting], prepared: dict[Any, Row], output: Path) -> None:
    """peers.json and peers_table.md in the output directory."""
    output.mkdir(parents=True, exist_ok=True)
    setup = {
        name: {key: value for key, value in found.items() if key != "place"}
        for name, found in prepared.items()
    }
    setup["Assent, with what training and tests need"] = {
        "megabytes": environments.megabytes(Path(sys.prefix))
    }
    figures = {
        "setup": setup,
        "worlds": {setting.world: figures_of(setting) for setting in settings},
    }
    (output / "peers.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = markdown(figures)
    (output / "peers_table.md").write_text(text, encoding="utf-8")
    print(text)


def figures_of(setting: Setting) -> Row:
    """All figures of a world."""
    serving, decoding = serving_rows(setting), decoding_rows(setting)
    grade, prompts = world_of(setting).grade, prompts_of(setting)
    drawn = setting.result(answers_job(BASELINE))["texts"]
    baseline = [grade(prompts, texts) for texts in zip(*drawn, strict=True)]  # [N][prompts]
    others = setting.result(answers_job(ORACLE))["texts"]
    chances = [grade(prompts, texts) for texts in zip(*others, strict=True)]
    logprobs = setting.result(FLUENCY)["rows"]

    def quality(name: str) -> Row:
        texts = setting.result(answers_job(name))["texts"]
        few = prompts[: len(texts)]
        return {
            "prompts": len(texts),
            "wins": wins(grade(few, texts), [scores[: len(texts)] for scores in baseline]),
            "words": fmean(len(text.split()) for text in texts),
            "logprob": mean(logprobs[name]),
        }

    rows: dict[str, Row] = {}
    for names, rounds, reference in (
        (serving, timing.SERVING_ROUNDS, BEST_OF),
        (decoding, timing.DECODING_ROUNDS, DECODING_BEST_OF),
    ):
        if names:
            timed = setting.result(rounds)
            seconds, clients = timed["rows"], timed["clients"]
            for name in names:
                result = setting.result(answers_job(name))
                counted = {key: value for key, value in result.items() if key != "texts"}
                times = speed(clients, seconds[name], seconds[reference])
                rows[name] = quality(name) | counted | {"seconds": times}
    best = [max(scores) for scores in zip(*chances, strict=True)]
    return {
        "prompts": len(prompts),
        "rows": rows,
        ORACLE: {"wins": wins(best, baseline)},
        "plain_logprob": mean(logprobs[ORACLE]),
        "reward": setting.result("reward") if decoding and world_of(setting).reward is None else {},
        "scale": setting.result("scale") if decoding else {},
    }


def wins(ours: Sequence[float], baseline: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The share of plain answers [N][prompts] that ours [prompts] win against, and its standard error over prompts."""
    shares = [
        fmean((1 + (a > b) - (a < b)) / 2 for b in theirs)
        for a, theirs in zip(ours, zip(*baseline, strict=True), strict=True)
    ]
    return mean(shares)


def speed(
    clients: Sequence[int], ours: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
) -> list[Row]:
    """For each number of clients: the median of the seconds, and of the ratios within a round with their range."""
    figures = []
    for place, number in enumerate(clients):
        seconds = [turn[place] for turn in ours]
        ratios = [a / turn[place] for a, turn in zip(seconds, reference, strict=True)]
        figures.append(
            {
                "clients": number,
                "rounds": len(ours),
                "seconds": median(seconds),
                "ratio": median(ratios),
                "range": (min(ratios), max(ratios)),
            }
        )
    return figures


def markdown(figures: Row) -> str:
    """The tables for the docs."""
    parts = ["Written by `python -m benchmarks.peers`."]
    for name, world in figures["worlds"].items():
        title = {"toy": "The toy data", "smollm2": "SmolLM2-135M-Instruct"}[name]
        parts.append(
            f"## {title}\n\n{world['prompts']} prompts; wins are against {N} plain answers to each, ± the standard "
            f"error over prompts. Seconds a request are medians of rounds in which all rows have their turn; ratios to "
            f"best of {N} are medians [range] of those within a round."
        )
        served = [row for row in SERVING if row in world["rows"]]
        if served:
            lines = [_serving(SERVING[n].title, world["rows"][n]) for n in served]
            parts.append(_table(_serving_head(world["rows"][BEST_OF]), lines))
        parts.append(f"The grader itself chooses among {N}: {_share(world[ORACLE]['wins'])}.")
        decoded = [row for row in DECODING if row in world["rows"]]
        if decoded:
            trained = world["reward"]
            cost = (
                "{pairs:,} pairs, {train_cpu_seconds:.0f} CPU seconds".format(**trained)
                if trained
                else ""
            )
            parts.append("In transformers" + (f" (the reward: {cost}):" if cost else ":"))
            lines = [_decoding(DECODING[n].title, world["rows"][n]) for n in decoded]
            head = _decoding_head(world["rows"][DECODING_BEST_OF])
            parts.append(_table(head, lines))
    setup = [
        (name, f"{found['seconds']:.0f}" if "seconds" in found else "", f"{found['megabytes']:.0f}")
        for name, found in figures["setup"].items()
    ]
    parts.append("## Setting up\n\n" + _table(("package", "seconds", "MB"), setup))
    return "\n\n".join(parts) + "\n"


def _serving_head(row: Row) -> list[str]:
    tokens = ["tokens of the engine", "tokens reported"]
    return ["", "win rate", "prompts", *_time_heads(row, "clients:"), *tokens, *TEXT_HEADS]


def _decoding_head(row: Row) -> list[str]:
    passes = ["LLM passes a token", "reward passes a token"]
    return ["", "win rate", "prompts", *passes, *_time_heads(row, "batch of"), *TEXT_HEADS]


def _time_heads(row: Row, what: str) -> list[str]:
    """Of seconds and ratio, for each number of clients."""
    return [
        head
        for at in row["seconds"]
        for head in (f"s, {what} {at['clients']}", f"ratio, {at['rounds']} rounds")
    ]


TEXT_HEADS = ("words", "log p a token")


def _serving(title: str, row: Row) -> list[str]:
    tokens = [
        " / ".join("none" if n is None else f"{n:.0f}" for n in row[kind].values())
        for kind in ("engine", "reported")
    ]
    return [title, *_quality(row), *_times(row), *tokens, *_text(row)]


def _decoding(title: str, row: Row) -> list[str]:
    passes = [f"{row[kind]:.2f}" for kind in ("llm_passes", "reward_passes")]
    return [title, *_quality(row), *passes, *_times(row), *_text(row)]


def _quality(row: Row) -> list[str]:
    return [_share(row["wins"]), str(row["prompts"])]


def _times(row: Row) -> list[str]:
    return [
        cell
        for at in row["seconds"]
        for cell in (
            f"{at['seconds']:.3g}",
            "{:.2f} [{:.2f}, {:.2f}]".format(at["ratio"], *at["range"]),
        )
    ]


def _text(row: Row) -> list[str]:
    return [f"{row['words']:.1f}", "{:.2f} ± {:.2f}".format(*row["logprob"])]


def _share(figure: Sequence[float]) -> str:
    return "{:.1f} ± {:.1f} %".format(*(100 * value for value in figure))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in whole)
