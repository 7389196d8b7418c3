"""How many preference pairs each method needs: `python -m benchmarks.proxy_rlhf.pairs`.

Three methods, each trained on the same few pairs (drawn by the seed) and on all 12,000: a proxy with DPO, a proxy with
PPO and the implicit reward, and DPO of the whole LLM. Grades are those of `benchmarks.proxy_rlhf`, whose jobs are used
for all pairs. DPO of the LLM and the reward model see few pairs up to twenty times; the proxy with DPO chooses its
number of passes itself.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.comparison.jobs import Job, Setting, command
from benchmarks.comparison.trainings import (
    fixed,
    make_dpo,
    make_frozen,
    make_proxy,
    make_reward,
    make_toy_data,
)
from benchmarks.proxy_rlhf.methods import make_direct
from benchmarks.proxy_rlhf.plan import DIRECT_PAIRS
from benchmarks.proxy_rlhf.report import pooled

PAIRS = (100, 300, 1000, 3000)
"""For the methods other than the proxy with DPO; with 30 pairs a reward model learns nothing."""
ALL = 12_000
UPDATES = 20
DPO = 1e-4, 0.5
"""Learning rate and β; these and the updates are what `benchmarks.proxy_rlhf` chose with all pairs."""
METHODS = {
    "direct proxy": "direct",
    "proxy, PPO with the implicit reward": "proxy-implicit",
    "DPO of the whole LLM": "dpo",
}


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    jobs = [Job("world", make_toy_data)]
    for seed in seeds:
        jobs.append(make_frozen(seed))
        jobs += [make_direct(f"direct-{count}", seed, count) for count in DIRECT_PAIRS]
        jobs.append(make_direct("direct-all", seed))
        for count in (*PAIRS, None):
            suffix = f"-{count}" if count else ""
            jobs += [
                make_reward("implicit", seed, count),
                make_proxy(
                    f"proxy-implicit{suffix}/{seed}",
                    f"implicit{suffix}",
                    seed,
                    fixed(UPDATES),
                ),
                make_dpo(f"dpo{suffix}/{seed}", seed, fixed(DPO), num_pairs=count),
            ]
    return jobs


def curves(setting: Setting, seeds: tuple[int, ...]) -> dict[str, dict[int, dict[str, Any]]]:
    """By method and number of pairs, the means over the seeds."""

    def row(job: str) -> dict[str, Any]:
        return pooled([setting.result(f"{job}/{seed}")["row"] for seed in seeds])

    result = {}
    for method, job in METHODS.items():
        counts = DIRECT_PAIRS if job == "direct" else PAIRS
        full_job = f"{job}-all" if job == "direct" else job
        result[method] = {count: row(f"{job}-{count}") for count in counts} | {ALL: row(full_job)}
    return result


def draw(rows: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, by_count in rows.items():
        rates = [100 * row["win_rate"] for row in by_count.values()]
        errors = [100 * row["win_rate_se"] for row in by_count.values()]
        axes.errorbar(list(by_count), rates, yerr=errors, marker="o", capsize=3, label=method)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([*DIRECT_PAIRS, ALL])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("preference pairs")
    axes.set_ylabel("gold win rate against the frozen LLM, %")
    axes.legend()
    figure.savefig(path, dpi=120)


def write(setting: Setting, seeds: tuple[int, ...], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    rows = curves(setting, seeds)
    print("| method | pairs | gold win rate | by seed | KL, nats |\n|---|---|---|---|---|")
    for method, by_count in rows.items():
        for count, row in by_count.items():
            rates = " ".join(f"{100 * rate:.1f}" for rate in row["win_rates"])
            won = f"{row['win_rate']:.1%} ± {row['win_rate_se']:.1%}"
            print(f"| {method} | {count:,} | {won} | {rates} | {row['kl']:.2f} |")
    draw(rows, output / "pairs.png")
    figures = {"seeds": seeds, "methods": rows}
    (output / "pairs.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(__doc__, "benchmarks.proxy_rlhf.pairs", all_jobs, write)
