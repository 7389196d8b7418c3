"""The effect of strength and temperature, in two plots: `python -m benchmarks.dial`.

On held-out prompts of the toy data, for strengths from 0 (the frozen LLM) and temperatures from 0 (greedy): how often
an answer has a higher reference score than the frozen LLM's at the same temperature; and, at the training temperature,
the reference score against KL(proxied ‖ frozen) in nats a response, exact at every position of the sampled answers. The
trainer's rollout generates the answers with transformers, by the same accept/reject sampling as the server. All answers
of the proxies share one seed; the frozen answers that they are compared with have another.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from tqdm import tqdm

from benchmarks.models import DEMO, REPOSITORY
from benchmarks.toy_prompts import held_out_prompts, mean
from judge.options import read_options
from proxy.checkpoint import BaseModelId, identify, load
from training.conversations import Conversations
from training.models import end_ids, load_model
from training.policy import Decoding, Policy
from training.rollout import Rollout, generate
from training.toy_data import reference_scorer
from training.toy_data.grading import win_rate

matplotlib.use("Agg")

LABEL_DISTANCE = 0.11  # nats


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path = DEMO / "model"
    """The frozen LLM."""
    proxies: tuple[Path, ...] = (DEMO / "proxies" / "aligned", DEMO / "proxies" / "polite")
    """Proxies for it, one curve each."""
    strengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    """The points of a curve."""
    temperatures: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1.3)
    """Temperatures of all answers; the KL curve is at that of a proxy's training."""
    num_prompts: int = 500
    """Prompts of held-out combinations of topic and intent."""
    decoding: Decoding = field(default_factory=Decoding)
    """Decoding of all answers, except the temperature."""
    seed: int = 1
    """Seed of prompts and noise."""
    threads: int = 1
    """CPU threads; more threads than free cores are much slower than one."""
    output: Path = REPOSITORY / "docs"
    """Directory for dial.png, temperature.png and dial.json."""


class Sampler:
    """The frozen LLM with its tokenizer and the prompts; answers them under any policy."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, self.tokenizer = load_model(str(options.model))
        self.model.to(torch.bfloat16).eval()
        self.texts = held_out_prompts(options.num_prompts, options.seed)
        chats = Conversations(self.tokenizer)
        self.prompts = [chats.prompt_ids([{"role": "user", "content": t}]) for t in self.texts]

    def answer(
        self, policy: Policy, temperature: float, seed: int, *, measure_kl: bool
    ) -> tuple[Rollout, list[str]]:
        rollout = generate(
            policy,
            self.prompts,
            replace(self.options.decoding, temperature=temperature),
            end_ids=end_ids(self.model, self.tokenizer),
            seeds=count(seed << 32),
            measure_kl=measure_kl,
        )
        return rollout, self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)


def measure(options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    sampler = Sampler(options)
    base: BaseModelId = identify(str(options.model))
    seed_of_frozen = options.seed + 1_000_000
    frozen = {
        temperature: sampler.answer(
            Policy(sampler.model), temperature, seed_of_frozen, measure_kl=False
        )[1]
        for temperature in options.temperatures
    }
    points = []
    cases = list(product(options.proxies, options.temperatures, options.strengths))
    for path, temperature, strength in tqdm(cases, desc="points"):
        proxy = load(path, base=base)
        policy = Policy(sampler.model, proxy.network, strength)
        is_trained = temperature == proxy.config.temperature
        rollout, texts = sampler.answer(policy, temperature, options.seed, measure_kl=is_trained)
        golds = [reference_scorer.score(*pair) for pair in zip(sampler.texts, texts, strict=True)]
        rate = win_rate(sampler.texts, texts, frozen[temperature])
        counts = rollout.counts
        point = {
            "proxy": path.name,
            "version": proxy.version,
            "temperature": temperature,
            "strength": strength,
            **dict(zip(("gold", "gold_se"), mean(golds), strict=True)),
            **dict(zip(("win_rate", "win_rate_se"), rate, strict=True)),
            "acceptance_rate": 1 - counts.rejected / counts.proposed,
            "forced_rate": counts.forced / counts.tokens,
        }
        if rollout.kl is not None:
            point |= dict(zip(("kl", "kl_se"), mean(rollout.kl.tolist()), strict=True))
        points.append(point)
    figures: dict[str, Any] = {"prompts": len(sampler.texts), "seed": options.seed}
    for temperature, texts in frozen.items():
        golds = [reference_scorer.score(*pair) for pair in zip(sampler.texts, texts, strict=True)]
        values = dict(zip(("gold", "gold_se"), mean(golds), strict=True))
        figures.setdefault("frozen", []).append({"temperature": temperature} | values)
    return figures | {"points": points}


def of_each_proxy(figures: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and points of each proxy."""
    for name in dict.fromkeys(point["proxy"] for point in figures["points"]):
        yield name, [point for point in figures["points"] if point["proxy"] == name]


def markdown(figures: dict[str, Any]) -> str:
    """The tables for the docs."""
    lines = [
        "| proxy | strength | KL, nats a response | gold score | gold win rate | accepted |",
        "|---|---|---|---|---|---|",
    ]
    for p in figures["points"]:
        if "kl" in p:
            lines.append(
                f"| `{p['proxy']}` | {p['strength']:g} | {max(p['kl'], 0):.2f} ± {p['kl_se']:.2f} "
                f"| {p['gold']:.2f} ± {p['gold_se']:.2f} "
                f"| {p['win_rate']:.1%} ± {p['win_rate_se']:.1%} | {p['acceptance_rate']:.1%} |"
            )
    temperatures = list(dict.fromkeys(p["temperature"] for p in figures["points"]))
    columns = " | ".join(f"T {temperature:g}" for temperature in temperatures)
    lines += ["", f"| proxy | strength | {columns} |", "|---" * (2 + len(temperatures)) + "|"]
    for name, points in of_each_proxy(figures):
        for strength in dict.fromkeys(point["strength"] for point in points):
            rates = [f"{p['win_rate']:.1%}" for p in points if p["strength"] == strength]
            lines.append(f"| `{name}` | {strength:g} | {' | '.join(rates)} |")
    worst = max(point["win_rate_se"] for point in figures["points"])
    lines.append(f"\nStandard errors: at most {worst:.1%}.")
    return "\n".join(lines) + "\n"


def labels(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The strengths as labels, and their points; labels of neighbouring points are merged at the last one."""
    together: list[str] = []
    for point, after in zip_longest(points, points[1:]):
        together.append(f"{point['strength']:g}")
        if after is None or abs(after["kl"] - point["kl"]) > LABEL_DISTANCE:
            yield ", ".join(together), point
            together = []


def plot_divergence(figures: dict[str, Any], path: Path) -> None:
    """Reference score against KL, one curve for each proxy, labelled with strengths."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, all_points in of_each_proxy(figures):
        points = [point for point in all_points if "kl" in point]
        x, y, x_error, y_error = (
            [point[key] for point in points] for key in ("kl", "gold", "kl_se", "gold_se")
        )
        axes.errorbar(
            x, y, yerr=y_error, xerr=x_error, marker="o", capsize=2, label=f"proxy {name}"
        )
        for label, point in labels(points):
            axes.annotate(
                label,
                (point["kl"], point["gold"]),
                textcoords="offset points",
                xytext=(4, -12),
                fontsize=8,
            )
    axes.set_xlabel("KL(proxied ‖ frozen), nats a response")
    axes.set_ylabel("gold score (0 = no flaw)")
    axes.set_title(f"The dial: strengths at the points, {figures['prompts']} prompts, ± 1 s.e.")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_win_rates(figures: dict[str, Any], path: Path) -> None:
    """Win rate by strength and temperature, one map for each proxy."""
    proxies = list(of_each_proxy(figures))
    figure, all_axes = pyplot.subplots(
        1, len(proxies), figsize=(5.5 * len(proxies), 4.5), layout="constrained", squeeze=False
    )
    for axes, (name, points) in zip(all_axes[0], proxies, strict=True):
        temperatures = list(dict.fromkeys(point["temperature"] for point in points))
        strengths = list(dict.fromkeys(point["strength"] for point in points))
        rate_of = {(p["strength"], p["temperature"]): p["win_rate"] for p in points}
        rates = [[100 * rate_of[s, t] for t in temperatures] for s in strengths]
        image = axes.imshow(rates, cmap="RdYlGn", vmin=15, vmax=85, origin="lower", aspect="auto")
        for row, values in enumerate(rates):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axes.set_yticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        axes.set_xlabel("temperature (0 = greedy)")
        axes.set_ylabel("strength (0 = frozen LLM)")
        axes.set_title(f"proxy {name}")
    figure.colorbar(image, ax=all_axes[0], label="% won over the frozen LLM, same temperature")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(options: Options) -> None:
    figures = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "dial.json").write_text(
        json.dumps(figures, indent=2) + "\n", encoding="utf-8"
    )
    plot_divergence(figures, options.output / "dial.png")
    plot_win_rates(figures, options.output / "temperature.png")
    print(markdown(figures))


if __name__ == "__main__":
    main(read_options(Options, __doc__))
