"""The tables, the metrics behind them, and the plot, from the jobs' results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.comparison.answers import pooled_error
from benchmarks.comparison.jobs import Setting
from benchmarks.self_judge.judges import JUDGES, Rate
from benchmarks.self_judge.methods import CEILING
from benchmarks.self_judge.plan import SAMPLING_MODELS

PUBLISHED = Path("docs/results/proxy_rlhf.json")
PUBLISHED_ROWS = {
    "DPO": "DPO",
    "full RLHF (PPO), implicit reward": "full RLHF (PPO), implicit reward",
    "full RLHF (PPO), self-judge reward": "full RLHF (PPO), self-judge as bundled",
    "**Proxy-RLHF, one-pass**, scalar reward": "one-pass proxy, scalar reward",
    "**Proxy-RLHF, one-pass**, self-judge reward": "one-pass proxy, self-judge as bundled",
}
"""Rows of the published Proxy-RLHF table, which has the same LLM, prompts and seeds, and their names here."""
TRAINED = {
    "dpo-more": "DPO, more data",
    "self-training-judge": "**self-training**, self-judge LoRA",
    "self-training-more": "self-training, likelihood ratio LoRA, more data",
    "proxy-implicit": "one-pass proxy, implicit reward",
    "proxy-more": "one-pass proxy, likelihood ratio LoRA, more data",
    "proxy-judge": "**one-pass proxy, self-judge LoRA**",
}


def pooled(rates: Sequence[Rate]) -> Rate:
    """The mean over the seeds and its standard error."""
    means, errors = zip(*rates, strict=True)
    return fmean(means), pooled_error(errors)


def figures_of(setting: Setting, seed: int) -> dict[str, Any]:
    """The results of a seed's jobs."""

    def of(job: str) -> dict[str, Any]:
        return setting.result(f"{job}/{seed}")

    return {
        "judged": of("judged"),
        "best_of": {
            sampling_model: of(f"best-of-{sampling_model}")["rows"]
            for sampling_model in SAMPLING_MODELS
        },
        "strategies": of("strategies"),
        "trained": {
            name: of(name)["row"] | {"train_cpu_seconds": of(name)["train_cpu_seconds"]}
            for name in TRAINED
        },
    }


def tables(by_seed: dict[str, dict[str, Any]]) -> str:
    """All tables, in Markdown."""
    results = list(by_seed.values())
    return "\n".join(
        [
            *_judge_tables([figures["judged"] for figures in results]),
            *_best_of_tables([figures["best_of"] for figures in results]),
            *_strategy_table([figures["strategies"] for figures in results]),
            *_training_table(by_seed),
        ]
    )


def _judge_tables(judged: list[dict[str, Any]]) -> list[str]:
    measures = ("gold", "labels", "gold_clear", "consistency", "consistency_clear")
    head = ("gold", "noisy labels", "gold, clear pairs", "both orders agree", "and on clear pairs")

    def rows(kind: str, columns: Sequence[str]) -> Iterable[tuple[str, ...]]:
        for name in judged[0][kind]:
            yield name, *(_percent([seed[kind][name][m] for seed in judged]) for m in columns)

    return [
        "## Judges, on held-out pairs\n",
        _table(("judge", *head), rows("judges", measures)),
        f"The labels agree with gold in {fmean(seed['noise_ceiling'] for seed in judged):.1%} of the pairs.\n",
        "## The LoRA by each principle, on pairs that differ by it\n",
        _table(
            ("principle", head[0], head[1], head[3]),
            rows("principles", (measures[0], measures[1], measures[3])),
        ),
    ]


def _best_of_tables(best_of: list[dict[str, Any]]) -> list[str]:
    parts = []
    for sampling_model in SAMPLING_MODELS:
        results = [seed[sampling_model] for seed in best_of]
        sizes = list(next(iter(results[0].values())))
        rows = (
            (name, *(_percent([seed[name][n] for seed in results]) for n in sizes))
            for name in results[0]
        )
        parts += [
            f"## Best of N, {sampling_model}: gold win rate against the frozen LLM\n",
            _table(("judge", *sizes), rows),
        ]
    return parts


def _strategy_table(strategies: list[dict[str, Any]]) -> list[str]:
    def row(name: str) -> tuple[str, ...]:
        results = [seed["strategies"][name] for seed in strategies]
        return (
            name,
            f"{fmean(result['comparisons'] for result in results):.1f}",
            _percent([result["finds_golds_best"] for result in results]),
            _percent([result["agrees_with_round_robin"] for result in results]),
            "{:.3f} ± {:.3f}".format(*pooled([result["gold"] for result in results])),
        )

    head = ("strategy", "comparisons", "finds gold's best", "as round-robin", "gold score")
    return [
        f"## Strategies, of 16 answers, {strategies[0]['prompts']} prompts a seed\n",
        _table(head, map(row, strategies[0]["strategies"])),
    ]


def _training_table(by_seed: dict[str, dict[str, Any]]) -> list[str]:
    published = json.loads(PUBLISHED.read_text())["by_seed"]
    rows = [
        *(
            _trained(name, [published[row][int(i)] for i in by_seed])
            for row, name in PUBLISHED_ROWS.items()
        ),
        *(
            _trained(name, [figures["trained"][job] for figures in by_seed.values()])
            for job, name in TRAINED.items()
        ),
    ]
    head = ("method", "gold win rate", "by seed", "CPU s", "KL, nats")
    return ["## Training by a judge\n", _table(head, rows)]


def _trained(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return (
        name,
        _percent([(row["win_rate"], row["win_rate_se"]) for row in rows]),
        " ".join(f"{row['win_rate']:.1%}" for row in rows),
        f"{fmean(row['train_cpu_seconds'] for row in rows):.0f}",
        f"{fmean(row['kl'] for row in rows):.2f}",
    )


def _percent(rates: Sequence[Rate]) -> str:
    mean, error = pooled(rates)
    return f"{mean:.1%} ± {error:.1%}"


def _table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(by_seed: dict[str, dict[str, Any]], path: Path) -> None:
    """Best of N by every judge, one panel for each sampling model."""
    figure = Figure(figsize=(4 * len(SAMPLING_MODELS), 4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(JUDGES)} | {CEILING: "grey"}
    panels = figure.subplots(1, len(SAMPLING_MODELS), sharey=True)
    for axes, sampling_model in zip(panels, SAMPLING_MODELS, strict=True):
        results = [figures["best_of"][sampling_model] for figures in by_seed.values()]
        for name in results[0]:
            sizes = list(results[0][name])
            rates = [pooled([seed[name][n] for seed in results]) for n in sizes]
            means, errors = zip(*rates, strict=True)
            axes.errorbar(
                [int(n) for n in sizes],
                [100 * mean for mean in means],
                yerr=[196 * error for error in errors],
                marker="o",
                markersize=3,
                capsize=2,
                label=name,
                color=colours[name],
            )
        axes.set_xscale("log", base=2)
        axes.set_title(sampling_model, fontsize=9)
        axes.set_xlabel("N")
    panels[0].set_ylabel("gold win rate against the frozen LLM, %")
    panels[0].legend(fontsize=7)
    figure.supxlabel("bars: 95 %", fontsize=8)
    figure.savefig(path, dpi=110)


def write(setting: Setting, seeds: tuple[int, ...], output: Path) -> None:
    """Add the seeds to those in the output's file, so that several machines may share the work."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "self_judge.json"
    by_seed = json.loads(path.read_text()) if path.exists() else {}
    by_seed |= {str(seed): figures_of(setting, seed) for seed in seeds}
    path.write_text(json.dumps(by_seed, indent=1) + "\n")
    (output / "self_judge_table.md").write_text(tables(by_seed))
    draw(by_seed, output / "self_judge.png")
