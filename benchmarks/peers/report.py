"""The figures, and the files of the report.

A win counts 1 and a tie 1/2, against each of N plain answers. Errors are over prompts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.peers import environments, tables, timing
from benchmarks.peers.lab import REWARD, SCALE
from benchmarks.peers.plan import BASELINE, FLUENCY, ORACLE, answers_job
from benchmarks.peers.rows import (
    BEST_OF,
    DECODING_BEST_OF,
    decoding_rows,
    serving_rows,
)
from benchmarks.peers.setting import Setting
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
    text = tables.markdown(figures)
    (output / "peers_table.md").write_text(text, encoding="utf-8")
    print(text)


def figures_of(setting: Setting) -> Row:
    """All figures of a world, of the jobs that are finished."""
    serving, decoding = serving_rows(setting), decoding_rows(setting)
    grade, prompts = world_of(setting).grade, prompts_of(setting)
    drawn = setting.result(answers_job(BASELINE))["texts"]
    baseline = [grade(prompts, texts) for texts in zip(*drawn, strict=True)]  # [N][prompts]
    others = setting.result(answers_job(ORACLE))["texts"]
    chances = [grade(prompts, texts) for texts in zip(*others, strict=True)]
    logprobs = _finished(setting, FLUENCY).get("rows", {})

    def quality(name: str) -> Row:
        texts = setting.result(answers_job(name))["texts"]
        few = prompts[: len(texts)]
        return {
            "prompts": len(texts),
            "wins": wins(grade(few, texts), [scores[: len(texts)] for scores in baseline]),
            "words": fmean(len(text.split()) for text in texts),
            "logprob": mean(logprobs[name]) if name in logprobs else None,
        }

    rows: dict[str, Row] = {}
    for names, rounds, reference in (
        (serving, timing.SERVING_ROUNDS, BEST_OF),
        (decoding, timing.DECODING_ROUNDS, DECODING_BEST_OF),
    ):
        timed = _finished(setting, rounds)
        seconds = timed.get("rows", {})
        for name in names:
            result = _finished(setting, answers_job(name))
            if result:
                rows[name] = quality(name) | {k: v for k, v in result.items() if k != "texts"}
                rows[name]["seconds"] = (
                    speed(timed["clients"], seconds[name], seconds[reference])
                    if name in seconds
                    else []
                )
    best = [max(scores) for scores in zip(*chances, strict=True)]
    return {
        "prompts": len(prompts),
        "rows": rows,
        ORACLE: {"wins": wins(best, baseline)},
        "reward": _finished(setting, REWARD),
        "scale": _finished(setting, SCALE),
    }


def _finished(setting: Setting, job: str) -> Row:
    """A job's result, empty if there is none."""
    return setting.result(job) if (setting.directory(job) / "result.json").exists() else {}


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
