"""Jobs that both comparisons run: the data, the frozen LLM's answers, rewards, proxies and DPO.

The reference scorer grades; no training sees it.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor

from benchmarks.comparison.answers import answer, by_policy
from benchmarks.comparison.evaluation import (
    DATA_SEED,
    DECODING,
    graded,
    noise,
    open_evaluation_set,
    tuned,
)
from benchmarks.comparison.jobs import Job, Setting, timed
from training import dpo, ppo_trainer, proxy_ppo, reward_model
from training.models import load_model
from training.on_policy import start
from training.policy import Policy
from training.toy_data import files as toy_files
from training.toy_data import reference_scorer

TrainerT = TypeVar("TrainerT", bound=proxy_ppo.ProxyPPOTrainer)
Choose = Callable[[Setting], Any]
"""Chooses the settings of a method, from the results of its search jobs."""


def make_toy_data(setting: Setting, directory: Path) -> dict[str, Any]:
    options = toy_files.Options(
        output=directory,
        overwrite=True,
        seed=DATA_SEED,
        num_sft=1,
        num_preferences=setting.num_pairs,
        num_held_out=setting.num_test,
    )
    toy_files.main(options)
    return {"prompts": options.num_prompts, "pairs": options.num_preferences}


def make_frozen(seed: int) -> Job:
    """The frozen LLM's answers, the baseline of all others, and its answers under other decodings."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        for split in ("validation", "test"):
            evaluation = open_evaluation_set(setting, split)
            roll_out = by_policy(evaluation, Policy(evaluation.model), DECODING)
            texts = answer(evaluation, noise("frozen", seed), roll_out).texts
            (directory / f"{split}.json").write_text(json.dumps(texts))
        rows = {
            "frozen, again": DECODING,
            "top-p 0.8": replace(DECODING, top_p=0.8),
            "top-p 0.6": replace(DECODING, top_p=0.6),
            "greedy": replace(DECODING, temperature=0.0),
        }
        result = {}
        for name, decoding in rows.items():
            policy = Policy(evaluation.model)
            answers = answer(evaluation, noise(name, seed), by_policy(evaluation, policy, decoding))
            result[name] = graded(setting, evaluation, answers, seed, policy, decoding)
        return {"rows": result}

    return Job(f"frozen/{seed}", run, ("world",))


def make_reward(kind: str, seed: int, num_pairs: int | None = None) -> Job:
    """A reward model from all pairs, or from `num_pairs` of them; the latter is known as the reward
    `<kind>-<num_pairs>`.
    """

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with timed(result):
            reward_model.main(
                reward_model.Options(
                    model=str(setting.model),
                    preferences=str(subset_of_pairs(setting, num_pairs, seed)),
                    output=directory,
                    overwrite=True,
                    kind=kind,  # type: ignore[arg-type]
                    epochs=passes(num_pairs),
                    seed=seed,
                )
            )
        return result

    name = f"{kind}-{num_pairs}" if num_pairs else kind
    return Job(f"reward-{name}/{seed}", run, ("world",))


def passes(num_pairs: int | None) -> float:
    """Passes over `num_pairs` pairs; fewer pairs need more passes."""
    return 1.0 if num_pairs is None else max(1.0, min(20.0, 12_000 / num_pairs))


def needs_of_reward(reward: str, seed: int) -> tuple[str, ...]:
    return (
        f"frozen/{seed}",
        *(() if reward == "self-judge" else (f"reward-{reward}/{seed}",)),
    )


def reward_path(setting: Setting, reward: str, seed: int) -> str:
    if reward == "self-judge":
        return reward
    return str(setting.directory(f"reward-{reward}/{seed}"))


def train_and_grade(
    trainer: ppo_trainer.PPOTrainer[Any], steps: int, result: dict[str, Any]
) -> None:
    """Run all updates of PPO and record the reference score of each rollout beside its reward."""
    scored, curve = trainer.reward, []

    def watched(samples: Any) -> Tensor:
        golds.extend(reference_scorer.score(s.messages[-1]["content"], s.text) for s in samples)
        return scored(samples)

    trainer.reward = watched
    for index in range(steps):
        golds: list[float] = []
        row = trainer.step(index)
        curve.append({"gold": fmean(golds)} | row)
    result["curve"] = curve


def make_proxy(
    name: str,
    reward: str,
    seed: int,
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
    start_from: str | None = None,
    trainer_class: type[proxy_ppo.ProxyPPOTrainer] = proxy_ppo.ProxyPPOTrainer,
    **settings: Any,
) -> Job:
    """A proxy trained with PPO.

    Args:
        name: of the job.
        reward: which trains it.
        seed: of the training.
        choose: the number of updates.
        needs: jobs that `choose` reads.
        split: whose prompts it answers.
        start_from: the job whose proxy it starts from.
        trainer_class: the trainer.
        settings: further options of `training.proxy_ppo`.
    """

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        initial = setting.directory(start_from) / "proxy" if start_from else None
        options = proxy_options(
            setting, directory, reward, seed, choose(setting), start_from=initial, **settings
        )
        trainer, result = train_proxy(trainer_class, options)
        trainer.save({"options": {}, "last": result["curve"][-1]})
        evaluation = open_evaluation_set(setting, split)
        policy = trainer.policy_class(evaluation.model, trainer.network)
        roll_out = by_policy(evaluation, policy, options.decoding)
        answers = answer(evaluation, noise("proxy", seed), roll_out)
        row = graded(setting, evaluation, answers, seed, policy, options.decoding, split)
        return result | {"row": row}

    initial_job = (start_from,) if start_from else ()
    return Job(name, run, (*needs_of_reward(reward, seed), *needs, *initial_job))


def proxy_options(
    setting: Setting, directory: Path, reward: str, seed: int, updates: int, **settings: Any
) -> proxy_ppo.Options:
    """Options of a PPO run of the comparison's size."""
    return proxy_ppo.Options(
        model=str(setting.model),
        reward=reward_path(setting, reward, seed),
        prompts=setting.data("prompts"),
        output=directory,
        steps=setting.updates(updates),
        episodes=setting.episodes,
        seed=seed,
        **settings,
    )


def train_proxy(
    trainer_class: type[TrainerT], options: proxy_ppo.Options
) -> tuple[TrainerT, dict[str, Any]]:
    """The trainer after all updates, and what they took."""
    result: dict[str, Any] = {"updates": options.steps}
    with timed(result):
        trainer = trainer_class(options, start())
        train_and_grade(trainer, options.steps, result)
    result["parameters"] = trainer.network.num_parameters()
    return trainer, result


def subset_of_pairs(setting: Setting, count: int | None, seed: int) -> Path:
    """A file with `count` of the pairs, drawn by the seed; None = all of them."""
    source = Path(setting.data("preferences"))
    if count is None:
        return source
    lines = source.read_text().splitlines()
    drawn = random.Random(seed).sample(lines, min(count, len(lines)))
    path = setting.work / "pairs" / f"{count}-{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")  # several jobs draw the same pairs
    temporary.write_text("".join(line + "\n" for line in drawn))
    temporary.replace(path)
    return path


def make_dpo(
    name: str,
    seed: int,
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
    file: str = "world/preferences.jsonl",
    num_pairs: int | None = None,
) -> Job:
    """DPO on the file's pairs, or on `num_pairs` of the toy data's."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        learning_rate, beta = choose(setting)
        result: dict[str, Any] = {"learning_rate": learning_rate, "beta": beta}
        pairs = subset_of_pairs(setting, num_pairs, seed) if num_pairs else setting.work / file
        options = dpo.Options(
            model=str(setting.model),
            preferences=str(pairs),
            output=directory,
            overwrite=True,
            learning_rate=learning_rate,
            beta=beta,
            epochs=passes(num_pairs),
            seed=seed,
        )
        with timed(result):
            dpo.main(options)
        count = pairs.read_text().count("\n")
        result["updates"] = int(-(-count // options.batch_size) * options.epochs)
        result["parameters"] = load_model(str(directory))[0].num_parameters()
        return result | {"row": tuned(setting, directory, seed, split)}

    return Job(name, run, (f"frozen/{seed}", *needs))


def fixed(value: Any) -> Callable[[Setting], Any]:
    return lambda setting: value
