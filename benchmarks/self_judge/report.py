"""The tables, the figures behind them and the plot, from the jobs' results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.jobs import Setting
from benchmarks.proxy_rlhf.report import pooled_error
from benchmarks.self_judge.judges import JUDGES, Rate
from benchmarks.self_judge.plan import BORROWED, SPEAKERS

TRAINED = {
    "dpo": "DPO",
    "dpo-more": "DPO, more data",
    "rlhf-implicit": "full RLHF (PPO), implicit reward",
    "rlhf-self-judge": "full RLHF (PPO), self-judge as bundled",
    "self-training-judge": "**self-training**, self-judge LoRA",
    "self-training-more": "self-training, likelihood ratio LoRA, more data",
    "proxy-scalar": "one-pass proxy, scalar reward",
    "proxy-implicit": "one-pass proxy, implicit reward",
    "proxy-more": "one-pass proxy, likelihood ratio LoRA, more data",
    "proxy-self-judge": "one-pass proxy, self-judge as bundled",
    "proxy-judge": "**one-pass proxy, self-judge LoRA**",
}
assert set(BORROWED) < set(TRAINED)


def pooled(rates: Sequence[Rate]) -> Rate:
    """The mean over the seeds, and its standard error."""
    means, errors = zip(*rates, strict=True)
    return fmean(means), pooled_error(errors)


def figures_of(setting: Setting, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What the jobs found, seed by seed."""

    def each(job: str) -> list[dict[str, Any]]:
        return [setting.result(f"{job}/{seed}") for seed in seeds]

    return {
        "judged": each("judged"),
        "best_of": {speaker: each(f"best-of-{speaker}") for speaker in SPEAKERS},
        "strategies": each("strategies"),
        "trained": {name: each(name) for name in TRAINED},
    }


def tables(figures: dict[str, Any]) -> str:
    judged, trained = figures["judged"], figures["trained"]
    measures = ("gold", "labels", "gold_clear", "consistency", "consistency_clear")
    head = ("gold", "noisy labels", "gold, clear pairs", "both orders agree", "and on clear pairs")
    parts = [
        "## Judges, on held-out pairs\n",
        _table(
            ("judge", *head),
            (
                (name, *(_percent([seed["judges"][name][m] for seed in judged]) for m in measures))
                for name in judged[0]["judges"]
            ),
        ),
        f"The labels agree with gold in {fmean(seed['noise_ceiling'] for seed in judged):.1%} of the pairs.\n",
        "## The LoRA by each principle, on pairs that differ by it\n",
        _table(
            ("principle", head[0], head[1], head[3]),
            (
                (
                    name,
                    *(
                        _percent([seed["principles"][name][m] for seed in judged])
                        for m in (measures[0], measures[1], measures[3])
                    ),
                )
                for name in judged[0]["principles"]
            ),
        ),
    ]
    for speaker, found in figures["best_of"].items():
        sizes = list(next(iter(found[0]["rows"].values())))
        parts += [
            f"## Best of N, {speaker}: gold win rate against the frozen LLM\n",
            _table(
                ("judge", *sizes),
                (
                    (name, *(_percent([seed["rows"][name][n] for seed in found]) for n in sizes))
                    for name in found[0]["rows"]
                ),
            ),
        ]
    strategies = figures["strategies"]
    parts += [
        f"## Strategies, of 16 answers, {strategies[0]['prompts']} prompts a seed\n",
        _table(
            ("strategy", "comparisons", "finds gold's best", "as round-robin", "gold score"),
            (
                (
                    name,
                    f"{fmean(seed['strategies'][name]['comparisons'] for seed in strategies):.1f}",
                    *(
                        _percent([seed["strategies"][name][m] for seed in strategies])
                        for m in ("finds_golds_best", "agrees_with_round_robin")
                    ),
                    "{:.3f} ± {:.3f}".format(
                        *pooled([seed["strategies"][name]["gold"] for seed in strategies])
                    ),
                )
                for name in strategies[0]["strategies"]
            ),
        ),
        "## Training by a judge\n",
        _table(
            ("method", "gold win rate", "by seed", "CPU s", "KL, nats"),
            (_trained(TRAINED[name], found) for name, found in trained.items()),
        ),
    ]
    return "\n".join(parts)


def _trained(name: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    rows = [seed["row"] for seed in found]
    return (
        name,
        _percent([(row["win_rate"], row["win_rate_se"]) for row in rows]),
        " ".join(f"{row['win_rate']:.1%}" for row in rows),
        f"{fmean(seed['train_cpu_seconds'] for seed in found):.0f}",
        f"{fmean(row['kl'] for row in rows):.2f}",
    )


def _percent(rates: Sequence[Rate]) -> str:
    mean, error = pooled(rates)
    return f"{mean:.1%} ± {error:.1%}"


def _table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Best of N by every judge, a panel for each speaker."""
    figure = Figure(figsize=(4 * len(SPEAKERS), 4), layout="constrained")
    panels = figure.subplots(1, len(SPEAKERS), sharey=True)
    for axes, (speaker, found) in zip(panels, figures["best_of"].items(), strict=True):
        for name in found[0]["rows"]:
            sizes = list(found[0]["rows"][name])
            rates = [pooled([seed["rows"][name][n] for seed in found]) for n in sizes]
            means, errors = zip(*rates, strict=True)
            axes.errorbar(
                [int(n) for n in sizes],
                [100 * mean for mean in means],
                yerr=[196 * error for error in errors],
                marker="o",
                markersize=3,
                capsize=2,
                label=name,
                color=f"C{list(JUDGES).index(name)}",
            )
        axes.set_xscale("log", base=2)
        axes.set_title(speaker, fontsize=9)
        axes.set_xlabel("N")
    panels[0].set_ylabel("gold win rate against the frozen LLM, %")
    panels[0].legend(fontsize=7)
    figure.supxlabel("bars: 95 %", fontsize=8)
    figure.savefig(path, dpi=110)


def write(setting: Setting, seeds: tuple[int, ...], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    figures = figures_of(setting, seeds)
    (output / "self_judge_table.md").write_text(tables(figures))
    (output / "self_judge.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, output / "self_judge.png")
