"""What each job of the self-judge comparison does. The gold scorer grades; trainings never see it."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.jobs import Job, Setting, timed
from benchmarks.proxy_rlhf.methods import DECODING, frozen_texts, graded, noise, open_world
from benchmarks.proxy_rlhf.speakers import World, answer, by_policy, grade
from benchmarks.self_judge.judges import BATCH, PairJudge, load_judge
from judge.principles import FILE_NAME
from judge.prompts import Question
from judge.tournament import STRATEGIES
from judge.verdict import Ruling, Verdict
from proxy.checkpoint import identify, load
from training import jsft, reward_model, self_judge
from training.data import read_rows
from training.models import load_model
from training.policy import Policy
from training.rewards import Frozen
from training.world import gold, principles

CLEAR = 2.0
"""Pairs differ clearly where their gold scores differ by as much."""
SAMPLES = 16

Judges = dict[str, Callable[[Setting, int], Path | None]]
"""Name -> the directory of a seed's judge; None = the frozen LLM itself."""
JUDGES: Judges = {
    "self-judge, as bundled": lambda setting, seed: None,
    "self-judge, LoRA": lambda setting, seed: setting.directory(f"judge/{seed}"),
    "likelihood ratio, LoRA": lambda setting, seed: setting.directory(f"likelihood/{seed}"),
    "implicit reward": lambda setting, seed: setting.directory(f"reward-implicit/{seed}"),
    "scalar reward": lambda setting, seed: setting.directory(f"reward-scalar/{seed}"),
}
TRAINED = tuple(
    f"{name}/{{}}" for name in ("judge", "likelihood", "reward-implicit", "reward-scalar")
)


def needs(seed: int, *others: str) -> tuple[str, ...]:
    """The jobs that make all judges of a seed."""
    return (f"frozen/{seed}", *(name.format(seed) for name in TRAINED), *others)


def frozen_of(setting: Setting, world: World) -> Frozen:
    """Loaded anew: a judge that is a LoRA stays on its model."""
    model = load_model(str(setting.model), dtype=torch.bfloat16)[0].eval()
    base = identify(str(setting.model))
    return Frozen(model, world.tokenizer, base, DECODING, world.end_ids, BATCH)


def make_judge(seed: int, rank: int, learning_rate: float, epochs: float) -> Job:
    """The frozen LLM's judge as a LoRA, with the pairs of all and of each principle."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with timed(result):
            jsft.main(
                jsft.Options(
                    model=str(setting.model),
                    preferences=(setting.data("preferences"), setting.data("judgments")),
                    principles=setting.work / "world" / FILE_NAME,
                    output=directory,
                    lora_rank=rank,
                    learning_rate=learning_rate,
                    epochs=epochs,
                    seed=seed,
                )
            )
        return result

    return Job(f"judge/{seed}", run, ("world",))


def make_likelihood(seed: int, rank: int, learning_rate: float) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with timed(result):
            reward_model.main(
                reward_model.Options(
                    model=str(setting.model),
                    preferences=setting.data("preferences"),
                    output=directory,
                    lora_rank=rank,
                    learning_rate=learning_rate,
                    seed=seed,
                )
            )
        return result

    return Job(f"likelihood/{seed}", run, ("world",))


def make_judged(seed: int) -> Job:
    """What every judge says of the held-out pairs, whose noisy labels it may be compared with, and with gold."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        rows = read_rows(setting.data("preferences_test"))[: setting.num_test]
        by_principle = read_rows(setting.data("judgments_test"))[: setting.num_test]
        found = {}
        for name, directory_of in JUDGES.items():
            place = directory_of(setting, seed)
            judge = load_judge(place, frozen_of(setting, world))
            found[name] = agreement(judge, rows)
            if name == "self-judge, LoRA":
                found[name]["principles"] = {
                    principle: agreement(
                        load_judge(place, frozen_of(setting, world), principle),
                        [row for row in by_principle if row["principle"] == principle],
                        quality=principles.QUALITIES[principle],
                    )
                    for principle in principles.QUALITIES
                }
        ceiling = fmean(_gold(row) > 0 for row in rows)
        return {"judges": found, "noise_ceiling": ceiling, "pairs": len(rows)}

    return Job(f"judged/{seed}", run, needs(seed))


def agreement(
    judge: PairJudge, rows: Sequence[dict[str, Any]], quality: str | None = None
) -> dict[str, Any]:
    """Of labelled pairs: how often the judge agrees with gold and with the noisy labels, and with itself."""
    orders = judge([_question(row) for row in rows])
    prefers = orders.mean(-1) > 0.5
    golds = torch.tensor([_gold(row, quality) for row in rows])
    clear = golds.abs() >= (CLEAR if quality is None else 0)
    right = (prefers == (golds > 0)).float()
    consistent = ((orders[:, 0] > 0.5) == (orders[:, 1] > 0.5)).float()
    return {
        "gold": _rate(right),
        "labels": _rate(prefers.float()),
        "gold_clear": _rate(right[clear]),
        "consistency": _rate(consistent),
        "consistency_clear": _rate(consistent[clear]),
    }


def _rate(hits: Tensor) -> tuple[float, float]:
    """A share, and its standard error."""
    p = hits.mean().item()
    return p, math.sqrt(p * (1 - p) / len(hits))


def _question(row: dict[str, Any]) -> Question:
    return Question(row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"])


def _gold(row: dict[str, Any], quality: str | None = None) -> float:
    """Gold score of chosen over rejected; by a quality alone where it is named."""
    text = row["prompt"][-1]["content"]
    answers = (row[side][-1]["content"] for side in ("chosen", "rejected"))
    chosen, rejected = (
        gold.score(text, each) if quality is None else -float(quality in gold.flaws(text, each))
        for each in answers
    )
    return chosen - rejected


def make_samples(seed: int) -> Job:
    """Sixteen answers of the frozen LLM to each prompt, for all judges to choose from."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        roll_out = by_policy(world, Policy(world.model), DECODING)
        drawn = [answer(world, noise("best of", seed) + 10 * i, roll_out) for i in range(SAMPLES)]
        (directory / "texts.json").write_text(json.dumps([each.texts for each in drawn]))
        return {"cpu_seconds": sum(each.cpu_seconds for each in drawn)}

    return Job(f"samples/{seed}", run, (f"frozen/{seed}",))


def make_best_of(seed: int) -> Job:
    """The best of N by every judge's knock-out.

    The samples meet in the order in which they were drawn, so that the brackets of fewer are parts of the whole one.
    """

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        texts = json.loads((setting.directory(f"samples/{seed}") / "texts.json").read_text())
        reference = frozen_texts(setting, "test", seed)
        rows: dict[str, Any] = {}
        for name, directory_of in JUDGES.items():
            judge = load_judge(directory_of(setting, seed), frozen_of(setting, world))
            standing = [list(row) for row in zip(*texts, strict=True)]  # by prompt
            size = 1
            rows[name] = {1: _win_rate(world, [row[0] for row in standing], reference)}
            while len(standing[0]) > 1:
                standing = knock_out_round(judge, world.texts, standing)
                size *= 2
                rows[name][size] = _win_rate(world, [row[0] for row in standing], reference)
        return {"rows": rows}

    return Job(f"best-of-judges/{seed}", run, needs(seed, f"samples/{seed}"))


def knock_out_round(
    judge: PairJudge, prompts: Sequence[str], standing: list[list[str]]
) -> list[list[str]]:
    """Neighbours meet, of every prompt at once."""
    questions = [
        Question([{"role": "user", "content": prompt}], a, b)
        for prompt, row in zip(prompts, standing, strict=True)
        for a, b in zip(row[::2], row[1::2], strict=True)
    ]
    wins = iter((judge(questions).mean(-1) >= 0.5).tolist())
    return [
        [a if next(wins) else b for a, b in zip(row[::2], row[1::2], strict=True)]
        for row in standing
    ]


def _win_rate(world: World, texts: list[str], reference: list[str]) -> tuple[float, float]:
    from training.evaluate import win_rate

    return win_rate(world.texts, texts, reference)


def make_strategies(seed: int, num_prompts: int) -> Job:
    """Every strategy's choice among sixteen answers, from one judge's verdicts on all pairs."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        texts = json.loads((setting.directory(f"samples/{seed}") / "texts.json").read_text())
        judge = load_judge(setting.directory(f"judge/{seed}"), frozen_of(setting, world))
        count = max(2, int(num_prompts * setting.scale))
        chosen: dict[str, list[tuple[float, int, bool]]] = {name: [] for name in STRATEGIES}
        for place, prompt in enumerate(world.texts[:count]):
            answers = [sample[place] for sample in texts]
            golds = [gold.score(prompt, each) for each in answers]
            verdicts = all_verdicts(judge, prompt, answers)
            for name, strategy in STRATEGIES.items():
                ranking, comparisons = simulate(strategy, len(answers), place, verdicts)
                best = golds[ranking[0]]
                chosen[name].append((best, comparisons, best == max(golds)))
        return {
            "strategies": {
                name: {
                    "gold": fmean(each[0] for each in found),
                    "comparisons": fmean(each[1] for each in found),
                    "finds_golds_best": _rate(torch.tensor([float(each[2]) for each in found])),
                }
                for name, found in chosen.items()
            },
            "prompts": count,
        }

    return Job(f"strategies/{seed}", run, (f"judge/{seed}", f"samples/{seed}"))


Verdicts = dict[tuple[int, int], Verdict]


def all_verdicts(judge: PairJudge, prompt: str, answers: Sequence[str]) -> Verdicts:
    """Of every pair, whichever comes first."""
    turns = [{"role": "user", "content": prompt}]
    pairs = [(a, b) for a in range(len(answers)) for b in range(a)]
    orders = judge([Question(turns, answers[a], answers[b]) for a, b in pairs])  # type: ignore[arg-type]
    found: Verdicts = {}
    for (a, b), (first, second) in zip(pairs, orders.tolist(), strict=True):
        # Identical answers tie, as in the server, whatever the judge reads.
        if answers[a] == answers[b]:
            first = second = 0.5
        found[a, b], found[b, a] = Verdict((first, second)), Verdict((1 - second, 1 - first))
    return found


def simulate(strategy: Any, num: int, seed: int, verdicts: Verdicts) -> tuple[list[int], int]:
    """A strategy's ranking from verdicts that are known, and how many it asked for."""
    games, asked = strategy(num, seed), 0
    try:
        pairs = next(games)
        while True:
            asked += len(pairs)
            pairs = games.send([Ruling({"judge": verdicts[pair]}) for pair in pairs])
    except StopIteration as end:
        return end.value, asked


def make_self_training(
    name: str, seed: int, split: str, settings: dict[str, Any], judge: str | None
) -> Job:
    """On-policy self-training of all weights; the initial model judges."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = self_judge.Options(
            model=str(setting.model),
            prompts=setting.data("prompts"),
            held_out=setting.data("prompts_validation"),
            output=directory,
            lora_rank=0,
            seed=seed,
            **settings | {"steps": setting.updates(settings["steps"])},
        )
        result: dict[str, Any] = {"updates": options.steps}
        with timed(result):
            self_judge.main(options)
        world = open_world(setting, split)
        model, _ = load_model(str(directory), dtype=torch.bfloat16)
        policy = Policy(model.eval())
        answers = answer(world, noise("tuned", seed), by_policy(world, policy, DECODING))
        return result | {"row": graded(setting, world, answers, seed, policy, split=split)}

    return Job(name, run, (f"frozen/{seed}",))


def make_best_of_speaker(
    name: str, seed: int, proxy: str | None, tuned: str | None, size: int = 8
) -> Job:
    """The best of a proxy's answers, or of a tuned model's, by every judge."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        network = None
        if proxy is not None:
            network = load(setting.directory(proxy), base=identify(str(setting.model))).network
        model = world.model
        if tuned is not None:
            model = load_model(str(setting.directory(tuned)), dtype=torch.bfloat16)[0].eval()
        roll_out = by_policy(world, Policy(model, network), DECODING)
        key = noise("proxy best of", seed)
        drawn = [answer(world, key + 10 * i, roll_out) for i in range(size)]
        rows = {}
        for judged_by, directory_of in JUDGES.items():
            judge = load_judge(directory_of(setting, seed), frozen_of(setting, world))
            standing = [list(row) for row in zip(*(each.texts for each in drawn), strict=True)]
            while len(standing[0]) > 1:
                standing = knock_out_round(judge, world.texts, standing)
            best = [row[0] for row in standing]
            rows[judged_by] = _win_rate(world, best, frozen_texts(setting, "test", seed))
        alone = grade(world, drawn[0], frozen_texts(setting, "test", seed))
        return {"rows": rows, "alone": (alone["win_rate"], alone["win_rate_se"])}

    others = tuple(job for job in (proxy, tuned) if job is not None)
    return Job(name, run, needs(seed, *others))
