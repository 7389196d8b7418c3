"""The table, the metrics behind it, and the plots, from the jobs' results."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from safetensors import safe_open

from benchmarks.comparison.answers import pooled_error
from benchmarks.comparison.jobs import Setting
from benchmarks.proxy_rlhf.decodings import GRID, METHODS, best_job, search_job
from benchmarks.proxy_rlhf.plan import (
    BEST_OF,
    DIRECT_LOSSES,
    DIRECT_PAIRS,
    DIRECT_ROUNDS,
    PROXY_SEARCH,
    REWARDS,
    RLHF_SEARCH,
    SEARCHES,
    SKAM,
    searches,
)
from training.policy import Decoding

NAMES = {"dpo": "DPO", "rlhf": "full RLHF", "literal": "literal proxy", "proxy": "one-pass proxy"}
COSTS = ("updates", "train_cpu_seconds", "train_wall_seconds")

Row = dict[str, Any]


def rows_of(setting: Setting) -> dict[str, Callable[[int], Row]]:
    """Each row of the table: its metrics for a training seed."""

    def trained(job: str) -> Callable[[int], Row]:
        def figures(seed: int) -> Row:
            result = setting.result(f"{job}/{seed}")
            return result["row"] | {k: result[k] for k in ("parameters", *COSTS) if k in result}

        return figures

    def listed(job: str, name: str) -> Callable[[int], Row]:
        return lambda seed: setting.result(f"{job}/{seed}")["rows"][name]

    rows = {
        "frozen LLM, other noise": listed("frozen", "frozen, again"),
        "frozen, top-p 0.8": listed("frozen", "top-p 0.8"),
        "frozen, top-p 0.6": listed("frozen", "top-p 0.6"),
        "frozen, greedy": listed("frozen", "greedy"),
        "DPO": trained("dpo"),
    }
    for reward in REWARDS:
        rows[f"full RLHF (PPO), {reward} reward"] = trained(f"rlhf-{reward}")
    for reward in REWARDS:
        rows[f"Proxy-RLHF, literal, {reward} reward"] = trained(f"literal-{reward}")
    for reward in REWARDS:
        rows[f"**Proxy-RLHF, one-pass**, {reward} reward"] = trained(f"proxy-{reward}")
    rows["**direct**, 12,000 pairs"] = trained("direct-all")
    for count in DIRECT_PAIRS:
        rows[f"direct, {count:,} pairs"] = trained(f"direct-{count}")
    for loss, _ in DIRECT_LOSSES:
        rows[f"direct, {loss.upper()} in the place of DPO"] = trained(f"direct-{loss}")
    for rounds in DIRECT_ROUNDS:
        name = f"direct, 1,000 prompts, 6 samples by the implicit reward, rounds: {rounds}"
        rows[name] = trained(f"direct-sampled-{rounds}")
    rows["one-pass, implicit, started from direct"] = trained("proxy-from-direct")
    rows["one-pass, implicit, threshold in the place of coins"] = trained("threshold")
    rows["one-pass, implicit, without the log-probability"] = trained("proxy-without-logprob")
    for part in SKAM:
        rows[f"one-pass, implicit, {part}"] = trained("skam-" + part.replace(" ", "-"))
    for size in BEST_OF:
        rows[f"best of {size}, implicit reward"] = listed("best-of", f"best of {size}")
    rows["one-pass and best of 8, implicit reward"] = listed("proxy-best-of", "best of 8")
    return rows


def pooled(figures: list[Row]) -> Row:
    """Means over the seeds."""
    pool: Row = {}
    for name, value in figures[0].items():
        values = [row[name] for row in figures]
        if isinstance(value, dict):
            pool[name] = {key: fmean(seed_value[key] for seed_value in values) for key in value}
        else:
            pool[name] = fmean(values)
    rates = [row["win_rate"] for row in figures]
    pool["win_rates"] = rates
    pool["win_rate_se"] = pooled_error([row["win_rate_se"] for row in figures])
    return pool


def parameters_of(model: Path) -> int:
    with safe_open(model / "model.safetensors", "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def table(rows: dict[str, Row], full: int) -> str:
    """The table in Markdown. `full` = number of parameters of RLHF's actor and critic."""
    flaws = list(next(iter(rows.values()))["flaw_rates"])
    head = ["method", "gold win rate", "by seed", "trained parameters", "updates"]
    head += ["CPU s", "wall s", "KL, nats", "tokens", *flaws]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        count = row.get("parameters")
        cells = [
            name,
            f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}",
            " ".join(f"{100 * rate:.1f}" for rate in row["win_rates"]),
            f"{count:,.0f} ({count / full:.2%})" if count else "",
            *(
                f"{row[key]:.0f}" if key in row else ""
                for key in ("updates", "train_cpu_seconds", "train_wall_seconds")
            ),
            f"{row['kl']:.2f} ± {row['kl_se']:.2f}" if "kl" in row else "",
            f"{row['tokens_per_response']:.1f}",
            *(f"{row['flaw_rates'][flaw]:.1%}" for flaw in flaws),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def search_table(setting: Setting, seeds: tuple[int, ...]) -> str:
    """The results from which the methods' settings were chosen."""
    lines = [
        "| method | settings | gold win rate, validation | KL, nats | CPU s |",
        "|---|---|---|---|---|",
    ]
    words = {"dpo": "learning rate {:g}, β {:g}", "rlhf": "learning rate {:g}, KL weight {:g}"}
    for method, grid in SEARCHES.items():
        for settings, jobs in zip(grid, searches(method, seeds), strict=True):
            results = [setting.result(job) for job in jobs]
            row = pooled([result["row"] for result in results])
            named = words[method].format(*settings) if method in words else f"{settings} updates"
            won = f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}"
            kl = f"{row['kl']:.2f}" if "kl" in row else ""
            cpu = f"{sum(result['train_cpu_seconds'] for result in results):.0f}"
            lines.append(f"| {NAMES[method]} | {named} | {won} | {kl} | {cpu} |")
    return "\n".join(lines) + "\n"


def decodings_table(setting: Setting, seeds: tuple[int, ...]) -> str:
    """Each method at its best decoding, and the results of the search."""
    lines = ["| method | decoding | gold win rate | by seed | KL, nats |", "|---|---|---|---|---|"]
    tried = [
        f"| method, validation prompts | {' | '.join(map(_named, GRID))} |",
        "|---" * (1 + len(GRID)) + "|",
    ]
    for method in METHODS:
        results = [setting.result(best_job(method, seed)) for seed in seeds]
        row = pooled([result["row"] for result in results])
        cells = [
            method,
            _named(Decoding(**results[0]["decoding"])),
            f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}",
            " ".join(f"{100 * rate:.1f}" for rate in row["win_rates"]),
            f"{row['kl']:.2f}" if "kl" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        searched = [setting.result(search_job(method, seed))["rows"] for seed in seeds]
        rates = [fmean(row["win_rate"] for row in same) for same in zip(*searched, strict=True)]
        blank = [""] * (len(GRID) - len(rates))
        tried.append("| " + " | ".join([method, *blank, *(f"{x:.1%}" for x in rates)]) + " |")
    return "\n".join([*lines, "", *tried]) + "\n"


def _named(decoding: Decoding) -> str:
    if decoding.temperature == 0:
        return "greedy"
    return f"T {decoding.temperature:g}, top-p {decoding.top_p:g}"


def draw_wins(rows: dict[str, Row], path: Path) -> None:
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = [name.replace("*", "") for name in rows][::-1]
    for place, row in enumerate(list(rows.values())[::-1]):
        axes.errorbar(
            100 * row["win_rate"],
            place,
            xerr=196 * row["win_rate_se"],
            fmt="o",
            color="C0",
            capsize=3,
        )
        axes.plot(
            [100 * rate for rate in row["win_rates"]],
            [place] * len(row["win_rates"]),
            "|",
            color="C1",
        )
    axes.axvline(50, color="grey", linewidth=0.8)
    axes.axvline(63.24, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("gold win rate against the frozen LLM, %")
    figure.supxlabel("bars: 95 %; ticks: the seeds; dotted: the paper's 63.24 %", fontsize=8)
    figure.savefig(path, dpi=120)


def draw_hacking(setting: Setting, seeds: tuple[int, ...], path: Path) -> None:
    """Reward and reference score of each update's rollout, by method; the longest training first."""
    longest = PROXY_SEARCH.index(max(PROXY_SEARCH))
    hardest = {"rlhf": RLHF_SEARCH.index((1e-4, 0.02)), "literal": longest, "proxy": longest}
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.subplots(len(hardest), 1 + len(REWARDS))
    for line, (method, index) in zip(grid, hardest.items(), strict=True):
        pushed = searches(method, seeds)[index]
        _draw_curves(line[0], [setting.result(job)["curve"] for job in pushed])
        line[0].set_title(f"{NAMES[method]}, implicit, pushed", fontsize=9)
        for axes, reward in zip(line[1:], REWARDS, strict=True):
            jobs = [f"{method}-{reward}/{seed}" for seed in seeds]
            _draw_curves(axes, [setting.result(job)["curve"] for job in jobs])
            axes.set_title(f"{NAMES[method]}, {reward}", fontsize=9)
    figure.supxlabel(
        "update; blue: the reward that is trained on (left), orange: gold score (right)", fontsize=9
    )
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Any, curves: list[list[Row]]) -> None:
    golds = axes.twinx()
    for curve in curves:
        steps = [row["step"] for row in curve]
        axes.plot(steps, [row["reward"] for row in curve], color="C0", linewidth=1)
        golds.plot(steps, [row["gold"] for row in curve], color="C1", linewidth=1)
    axes.tick_params(labelsize=7)
    axes.tick_params(colors="C0", axis="y")
    golds.tick_params(labelsize=7, colors="C1")


def write(setting: Setting, seeds: tuple[int, ...], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    by_seed = {name: [of(seed) for seed in seeds] for name, of in rows_of(setting).items()}
    rows = {name: pooled(figures) for name, figures in by_seed.items()}
    full = 2 * parameters_of(setting.model)
    (output / "proxy_rlhf_table.md").write_text(
        table(rows, full) + "\n" + search_table(setting, seeds)
    )
    (output / "proxy_rlhf_decodings.md").write_text(decodings_table(setting, seeds))
    (output / "proxy_rlhf.json").write_text(json.dumps({"by_seed": by_seed}, indent=1) + "\n")
    draw_wins(rows, output / "proxy_rlhf.png")
    draw_hacking(setting, seeds, output / "reward_hacking.png")
    print(table(rows, full))
