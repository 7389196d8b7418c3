"""Every method at its own best decoding: the same search over temperature and top-p on validation prompts.

A lower temperature can improve a method as much as training does, and each method has another optimum. A comparison at
temperature 1 only would favour the methods that depend least on it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from statistics import fmean
from typing import Any

import torch

from benchmarks.comparison.answers import Answers, EvaluationSet, answer, by_policy, grade
from benchmarks.comparison.evaluation import frozen_texts, graded, noise, open_evaluation_set
from benchmarks.comparison.jobs import Job, Setting
from benchmarks.proxy_rlhf.methods import best_of, ranked_samples, reward_of
from proxy.checkpoint import identify, load
from training.models import load_model
from training.policy import Decoding, Policy

GRID = [
    Decoding(temperature=0.0),
    *(
        Decoding(temperature=temperature, top_p=top_p)
        for temperature, top_p in product((0.3, 0.5, 0.7, 1.0), (0.8, 0.95, 1.0))
    ),
]
"""The grid of the search. Best of N needs samples that differ, and leaves out the first one."""
SIZE = 8
BEST_OF = f"best of {SIZE}"
TRAINED = {
    "DPO": "dpo",
    "full RLHF": "rlhf-implicit",
    "one-pass proxy": "proxy-implicit",
    "direct proxy": "direct-all",
    "direct proxy, then PPO": "proxy-from-direct",
}
"""The jobs that train the methods."""
PROXIES = {"one-pass proxy": "", "direct proxy": "proxy", "direct proxy, then PPO": ""}
"""Where the proxy is below the job's directory."""
METHODS = ("frozen LLM", BEST_OF, *TRAINED)


def grid_of(method: str) -> list[Decoding]:
    return GRID[1:] if method == BEST_OF else GRID


def needs_of(method: str, seed: int) -> tuple[str, ...]:
    trained = f"{TRAINED[method]}/{seed}" if method in TRAINED else f"reward-implicit/{seed}"
    return (f"frozen/{seed}", *(() if method == "frozen LLM" else (trained,)))


class Method:
    """A trained method of one seed in memory, ready to answer under any decoding."""

    def __init__(
        self, setting: Setting, name: str, seed: int, split: str, share: float = 1.0
    ) -> None:
        self.setting, self.seed, self.split = setting, seed, split
        evaluation = open_evaluation_set(setting, split)
        count = math.ceil(share * len(evaluation.prompts))
        self.evaluation = replace(
            evaluation, texts=evaluation.texts[:count], prompts=evaluation.prompts[:count]
        )
        self.frozen = frozen_texts(setting, split, seed)[:count]
        self.policy = policy_of(setting, name, seed, self.evaluation)
        self.reward = reward_of(setting, seed, self.evaluation) if name == BEST_OF else None

    def answers(self, decoding: Decoding) -> Answers:
        evaluation, key = self.evaluation, noise("decodings", self.seed)
        if self.reward is not None:
            return best_of(
                ranked_samples(evaluation, self.policy, decoding, self.reward, SIZE, key), SIZE
            )
        return answer(evaluation, key, by_policy(evaluation, self.policy, decoding))

    def figures(self, decoding: Decoding) -> dict[str, Any]:
        """Metrics of its answers; without divergence if these are chosen among samples."""
        answers = self.answers(decoding)
        if self.reward is not None:
            return grade(self.evaluation, answers, self.frozen)
        return graded(
            self.setting, self.evaluation, answers, self.seed, self.policy, decoding, self.split
        )


def policy_of(setting: Setting, method: str, seed: int, evaluation: EvaluationSet) -> Policy:
    if method not in TRAINED:
        return Policy(evaluation.model)
    directory = setting.directory(f"{TRAINED[method]}/{seed}")
    if method in PROXIES:
        base = identify(str(setting.model))
        return Policy(evaluation.model, load(directory / PROXIES[method], base=base).network)
    return Policy(load_model(str(directory), dtype=torch.bfloat16)[0].eval())


def _slug(method: str) -> str:
    return method.replace(",", "").replace(" ", "-")


def search_job(method: str, seed: int) -> str:
    return f"decoding-search/{_slug(method)}/{seed}"


def best_job(method: str, seed: int) -> str:
    return f"decoding/{_slug(method)}/{seed}"


def make_search(method: str, seed: int) -> Job:
    """All decodings of the grid, on half of the validation prompts."""

    def run(setting: Setting, _: Any) -> dict[str, Any]:
        tried = Method(setting, method, seed, "validation", share=0.5)
        rows = [
            asdict(decoding) | grade(tried.evaluation, tried.answers(decoding), tried.frozen)
            for decoding in grid_of(method)
        ]
        return {"rows": rows}

    return Job(search_job(method, seed), run, needs_of(method, seed))


def chosen_decoding(method: str, seeds: tuple[int, ...]) -> Callable[[Setting], Decoding]:
    """The decoding with the highest win rate over all seeds."""

    def choose(setting: Setting) -> Decoding:
        rows = [setting.result(search_job(method, seed))["rows"] for seed in seeds]
        rates = [fmean(row["win_rate"] for row in same) for same in zip(*rows, strict=True)]
        return grid_of(method)[rates.index(max(rates))]

    return choose


def make_best(method: str, seed: int, seeds: tuple[int, ...]) -> Job:
    """The method at the chosen decoding, on test prompts."""

    def run(setting: Setting, _: Any) -> dict[str, Any]:
        decoding = chosen_decoding(method, seeds)(setting)
        row = Method(setting, method, seed, "test").figures(decoding)
        return {"decoding": asdict(decoding), "row": row}

    needs = tuple(search_job(method, training_seed) for training_seed in seeds)
    return Job(best_job(method, seed), run, needs)


def decoding_jobs(seeds: tuple[int, ...]) -> list[Job]:
    searches = [make_search(method, seed) for method in METHODS for seed in seeds]
    return searches + [make_best(method, seed, seeds) for method in METHODS for seed in seeds]
