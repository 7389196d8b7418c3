"""The figures of each row, from the answers and scores of all seeds, and the files of the report.

Prompts are the same in all seeds. So a mean and its standard error are taken over prompts, of each prompt's mean over
the seeds.
"""

import json
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.real import tables
from benchmarks.real.evaluation import test_job
from benchmarks.real.methods import BASELINE, METHODS, chosen, seeds_of
from benchmarks.real.opinions import REWARD, SECOND_HELPFUL, SECOND_PROBE
from benchmarks.real.setting import SETS, Setting
from benchmarks.real.texts import complies, distinct_overall, distinct_share, refuses
from benchmarks.real.words import SECOND_WORDS

Figure = tuple[float, float]
"""A mean and its standard error."""
WINS = (REWARD, SECOND_PROBE, SECOND_WORDS, SECOND_HELPFUL)
TEXTS: dict[str, Callable[[str], float]] = {
    "refuses": refuses,
    "complies": complies,
    "words": lambda text: len(text.split()),
    "distinct_3": distinct_share,
}


def over_prompts(by_seed: Sequence[Sequence[float]]) -> Figure:
    """Mean and standard error of values [seeds][prompts]."""
    means = [fmean(values) for values in zip(*by_seed, strict=True)]
    return fmean(means), stdev(means) / sqrt(len(means)) if len(means) > 1 else 0.0


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 for a higher score, 1/2 for the same."""
    return [(1 + (a > b) - (a < b)) / 2 for a, b in zip(ours, theirs, strict=True)]


def row_of(setting: Setting, name: str) -> dict[str, Any]:
    """All figures of a row: by set of prompts, and what it costs."""
    seeds = seeds_of(setting, METHODS[name])
    results = [setting.result(test_job(name, seed)) for seed in seeds]
    row: dict[str, Any] = {"seeds": len(seeds), "decoding": results[0]["decoding"]}
    for part in SETS:
        texts = [_read(setting, name, seed, "answers")[part] for seed in seeds]
        scores = [_read(setting, name, seed, "scores")[part] for seed in seeds]
        base = [_read(setting, BASELINE, seed, "scores")[part] for seed in seeds]
        figures: dict[str, Any] = {
            measure: over_prompts([[float(of(text)) for text in by_seed] for by_seed in texts])
            for measure, of in TEXTS.items()
        }
        figures["distinct_2"] = fmean(map(distinct_overall, texts))
        figures["tokens"] = over_prompts([result["tokens"][part] for result in results])
        figures["logprob"] = over_prompts([score["logprob"] for score in scores])
        figures["reward"] = over_prompts([score[REWARD] for score in scores])
        figures["wins"] = {
            opinion: over_prompts(
                [wins(a[opinion], b[opinion]) for a, b in zip(scores, base, strict=True)]
            )
            for opinion in WINS
            if opinion in scores[0]
        }
        figures["prompts"] = len(texts[0])
        row[part] = figures
    if "kl" in results[0]:
        row["kl"] = fmean(r["kl"] for r in results), fmean(r["kl_se"] for r in results)
    return row | _costs(setting, name, results)


def _costs(setting: Setting, name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answers = sum(len(tokens) for tokens in results[0]["tokens"].values())
    costs: dict[str, Any] = {
        "samples": results[0]["samples"],
        "answer_cpu_seconds": fmean(r["answer_cpu_seconds"] for r in results) / answers,
    }
    method = METHODS[name]
    if method.job is not None:
        trained = [setting.result(f"{method.job}/{seed}") for seed in setting.seeds]
        costs["parameters"] = trained[0]["parameters"]
        costs["train_cpu_seconds"] = fmean(t["train_cpu_seconds"] for t in trained)
    return costs


def _read(setting: Setting, name: str, seed: int, file: str) -> dict[str, Any]:
    return json.loads((setting.directory(test_job(name, seed)) / f"{file}.json").read_text())


def write(setting: Setting, output: Path) -> None:
    """`real_table.md` and `real.json` in the output directory."""
    output.mkdir(parents=True, exist_ok=True)
    rows = {name: row_of(setting, name) for name in chosen(setting)}
    figures = {
        "rows": rows,
        "judges": setting.result("accuracy")["judges"]
        | {SECOND_WORDS: setting.result(SECOND_WORDS)["right"]},
        "data": {k: n for k, n in setting.result("data").items() if k != "job_cpu_seconds"},
        "searches": tables.searches(setting, list(rows)),
        "rewards": {
            job: setting.result(job)
            for job in (REWARD, SECOND_PROBE, SECOND_HELPFUL, "reward-coherent")
            if (setting.directory(job) / "result.json").exists()
        },
    }
    (output / "real.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = tables.markdown(figures)
    (output / "real_table.md").write_text(text, encoding="utf-8")
    print(text)
