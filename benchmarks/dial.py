"""The dial: what a stricter proxy buys and what it costs, in a plot: `python -m benchmarks.dial`.

On held-out prompts of the bundled world, for strengths from 0 (the frozen LLM) upwards: the gold score of the answers
against KL(proxied ‖ frozen) in nats a response, exact at every position of the answers sampled. The trainer's rollout
answers, in transformers, by the same law as the server. All strengths of a proxy share one seed; the frozen answers
that they are compared with have another.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.models import DEMO, REPOSITORY
from proxy.checkpoint import BaseModelId, identify, load
from training.evaluate import win_rate
from training.models import Conversations, end_ids, load_model
from training.policy import Decoding, Policy
from training.rollout import Rollout, generate
from training.world import gold
from training.world.__main__ import draw_prompts, split_combinations

LABEL_DISTANCE = 0.11  # nats
WORLD_SEED = 0  # of the demo's data, by which the held-out combinations are known


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path = DEMO / "model"
    """The frozen LLM."""
    proxies: tuple[Path, ...] = (DEMO / "proxies" / "aligned", DEMO / "proxies" / "polite")
    """Proxies for it, a curve each."""
    strengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    """The points of a curve."""
    num_prompts: int = 500
    """Of held-out combinations of topic and intent."""
    decoding: Decoding = field(default_factory=Decoding)
    """Of all answers."""
    seed: int = 1
    """Of prompts and noise."""
    threads: int = 1
    """Of the CPU; more than there are free cores are much slower than one."""
    output: Path = REPOSITORY / "docs"
    """Directory for dial.png and dial.json."""


def held_out_prompts(count: int, seed: int) -> list[str]:
    """Texts of `count` prompts of the world's test split."""
    _, _, test = split_combinations(WORLD_SEED)
    return [prompt.text for prompt in islice(draw_prompts(test, random.Random(seed)), count)]


def mean(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


class Speaker:
    """The frozen LLM with its tokenizer and the prompts: answers them under any policy."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, self.tokenizer = load_model(str(options.model))
        self.model.to(torch.bfloat16).eval()
        self.texts = held_out_prompts(options.num_prompts, options.seed)
        chats = Conversations(self.tokenizer)
        self.prompts = [chats.prompt_ids([{"role": "user", "content": t}]) for t in self.texts]

    def answer(self, policy: Policy, seed: int, *, measure_kl: bool) -> tuple[Rollout, list[str]]:
        rollout = generate(
            policy,
            self.prompts,
            self.options.decoding,
            end_ids=end_ids(self.model, self.tokenizer),
            seeds=count(seed << 32),
            measure_kl=measure_kl,
        )
        return rollout, self.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)


def measure(options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    speaker = Speaker(options)
    base: BaseModelId = identify(str(options.model))
    _, frozen = speaker.answer(Policy(speaker.model), options.seed + 1_000_000, measure_kl=False)
    points = []
    cases = [(path, strength) for path in options.proxies for strength in options.strengths]
    for path, strength in tqdm(cases, desc="strengths"):
        proxy = load(path, base=base)
        policy = Policy(speaker.model, proxy.network, strength)
        rollout, texts = speaker.answer(policy, options.seed, measure_kl=True)
        assert rollout.kl is not None, "asked for above"
        golds = [gold.score(*pair) for pair in zip(speaker.texts, texts, strict=True)]
        counts = rollout.counts
        points.append(
            {"proxy": path.name, "version": proxy.version, "strength": strength}
            | dict(zip(("gold", "gold_se"), mean(golds), strict=True))
            | dict(
                zip(
                    ("win_rate", "win_rate_se"), win_rate(speaker.texts, texts, frozen), strict=True
                )
            )
            | dict(zip(("kl", "kl_se"), mean(rollout.kl.tolist()), strict=True))
            | {"acceptance_rate": 1 - counts.rejected / counts.proposed}
            | {"forced_rate": counts.forced / counts.tokens}
        )
    golds = [gold.score(*pair) for pair in zip(speaker.texts, frozen, strict=True)]
    figures: dict[str, Any] = {"prompts": len(speaker.texts), "seed": options.seed}
    figures |= dict(zip(("frozen_gold", "frozen_gold_se"), mean(golds), strict=True))
    return figures | {"points": points}


def markdown(figures: dict[str, Any]) -> str:
    """The table for the docs."""
    lines = [
        "| proxy | strength | KL, nats a response | gold score | gold win rate | accepted |",
        "|---|---|---|---|---|---|",
    ]
    for p in figures["points"]:
        lines.append(
            f"| `{p['proxy']}` | {p['strength']:g} | {max(p['kl'], 0):.2f} ± {p['kl_se']:.2f} "
            f"| {p['gold']:.2f} ± {p['gold_se']:.2f} "
            f"| {p['win_rate']:.1%} ± {p['win_rate_se']:.1%} | {p['acceptance_rate']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def labels(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The strengths, where to write them; those of points too close to be told apart together, at the last one."""
    together: list[str] = []
    for point, after in zip_longest(points, points[1:]):
        together.append(f"{point['strength']:g}")
        if after is None or abs(after["kl"] - point["kl"]) > LABEL_DISTANCE:
            yield ", ".join(together), point
            together = []


def plot(figures: dict[str, Any], path: Path) -> None:
    """Gold score against KL, a curve for each proxy, strengths at the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(
        figures["frozen_gold"], color="grey", linestyle=":", label="frozen LLM, other seed"
    )
    for name in dict.fromkeys(point["proxy"] for point in figures["points"]):
        points = [point for point in figures["points"] if point["proxy"] == name]
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


def main(options: Options) -> None:
    figures = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "dial.json").write_text(
        json.dumps(figures, indent=2) + "\n", encoding="utf-8"
    )
    plot(figures, options.output / "dial.png")
    print(markdown(figures))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
