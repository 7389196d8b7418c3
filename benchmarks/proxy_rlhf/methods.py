"""Jobs of methods that only this comparison has. The reference scorer grades; no training sees it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.comparison.answers import Answers, EvaluationSet, answer, by_policy, grade
from benchmarks.comparison.evaluation import (
    DECODING,
    frozen_texts,
    graded,
    noise,
    open_evaluation_set,
    tuned,
)
from benchmarks.comparison.jobs import Job, Setting, timed
from benchmarks.comparison.trainings import (
    Choose,
    needs_of_reward,
    reward_path,
    subset_of_pairs,
    train_and_grade,
)
from proxy.checkpoint import identify, load
from training import proxy_dpo, rlhf_ppo
from training.on_policy import start
from training.policy import Decoding, Policy
from training.reward_loading import load_reward
from training.rewards import Frozen, Reward, Sample


def make_direct(
    name: str, seed: int, num_pairs: int | None = None, rounds: int = 0, **settings: Any
) -> Job:
    """A proxy trained with DPO on pairs or, with rounds, on prompts and the implicit reward."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        data: dict[str, Any]
        if rounds:
            data = {
                "prompts": setting.data("prompts"),
                "max_rows": max(16, int(1000 * setting.scale)),
                "reward": reward_path(setting, "implicit", seed),
                "rounds": rounds,
            }
        else:
            data = {"preferences": str(subset_of_pairs(setting, num_pairs, seed))}
        options = proxy_dpo.Options(
            model=str(setting.model),
            output=directory / "proxy",
            cache=setting.directory("positions") if "loss" in settings else None,  # read once
            overwrite=True,
            seed=seed,
            **data,
            **settings,
        )
        result: dict[str, Any] = {}
        with timed(result):
            proxy_dpo.main(options)
        evaluation = open_evaluation_set(setting, "test")
        loaded = load(options.output, base=identify(str(setting.model)))
        result["parameters"] = loaded.network.num_parameters()
        policy = Policy(evaluation.model, loaded.network)
        answers = answer(evaluation, noise("proxy", seed), by_policy(evaluation, policy, DECODING))
        return result | {"row": graded(setting, evaluation, answers, seed, policy)}

    needs = needs_of_reward("implicit", seed) if rounds else (f"frozen/{seed}",)
    return Job(f"{name}/{seed}", run, needs)


def make_rlhf(
    name: str,
    reward: str,
    seed: int,
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        learning_rate, kl_weight = choose(setting)
        options = rlhf_ppo.Options(
            model=str(setting.model),
            reward=reward_path(setting, reward, seed),
            prompts=setting.data("prompts"),
            output=directory,
            steps=setting.updates(40),
            episodes=setting.episodes,
            learning_rate=learning_rate,
            kl_weight=kl_weight,
            epochs=2,  # with 4 it would take twice as long
            seed=seed,
        )
        result: dict[str, Any] = {
            "learning_rate": learning_rate,
            "kl_weight": kl_weight,
            "updates": options.steps,
        }
        with timed(result):
            trainer = rlhf_ppo.RLHFTrainer(options, start())
            train_and_grade(trainer, options.steps, result)
        result["parameters"] = sum(p.numel() for p in trainer.trained.parameters())
        trainer.save({})
        return result | {"row": tuned(setting, directory, seed, split)}

    return Job(name, run, (*needs_of_reward(reward, seed), *needs))


class Ranked(NamedTuple):
    """N samples for each of P prompts."""

    answers: list[Answers]  # N of them
    scores: Tensor  # [N, P], by the reward
    cpu_seconds: float


def reward_of(setting: Setting, seed: int, evaluation: EvaluationSet) -> Reward:
    """The implicit reward model of a seed."""
    base = identify(str(setting.model))
    frozen = Frozen(evaluation.model, evaluation.tokenizer, base, DECODING, evaluation.end_ids, 64)
    return load_reward(reward_path(setting, "implicit", seed), frozen)


def ranked_samples(
    evaluation: EvaluationSet,
    policy: Policy,
    decoding: Decoding,
    reward: Reward,
    count: int,
    key: int,
) -> Ranked:
    """`count` samples for each prompt, scored; `key` and every tenth number after it seed their noise."""
    all_answers, scores, cpu = [], [], 0.0
    for number in range(count):
        answers = answer(evaluation, key + 10 * number, by_policy(evaluation, policy, decoding))
        rows = zip(
            evaluation.texts, evaluation.prompts, answers.texts, answers.responses, strict=True
        )
        samples = [
            Sample([{"role": "user", "content": text}], reply, ids, response)
            for text, ids, reply, response in rows
        ]
        start = time.process_time()
        scores.append(reward(samples))
        cpu += answers.cpu_seconds + time.process_time() - start
        all_answers.append(answers)
    return Ranked(all_answers, torch.stack(scores), cpu)


def best_of(ranked: Ranked, size: int) -> Answers:
    """The best of the first `size` samples for each prompt."""
    best = ranked.scores[:size].argmax(0).tolist()
    last = ranked.answers[-1]
    return replace(
        last,
        texts=[ranked.answers[sample].texts[i] for i, sample in enumerate(best)],
        cpu_seconds=ranked.cpu_seconds * size / len(ranked.answers),
    )


def make_best_of(name: str, seed: int, proxy: str | None, sizes: tuple[int, ...]) -> Job:
    """The best of N by the implicit reward model; smaller N use the first of the same samples."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        evaluation = open_evaluation_set(setting, "test")
        base = identify(str(setting.model))
        network = load(setting.directory(proxy), base=base).network if proxy else None
        policy, reward = Policy(evaluation.model, network), reward_of(setting, seed, evaluation)
        key = noise("proxy best of" if proxy else "best of", seed)
        ranked = ranked_samples(evaluation, policy, DECODING, reward, max(sizes), key)
        frozen = frozen_texts(setting, "test", seed)
        return {
            "rows": {f"best of {n}": grade(evaluation, best_of(ranked, n), frozen) for n in sizes}
        }

    needs = (*needs_of_reward("implicit", seed), *((proxy,) if proxy else ()))
    return Job(f"{name}/{seed}", run, needs)
