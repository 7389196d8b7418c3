"""What each job trains, and how what it trained is graded. The gold scorer grades; trainings never see it."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.jobs import Job, Setting, timed
from benchmarks.proxy_rlhf.literal import LiteralTrainer
from benchmarks.proxy_rlhf.speakers import (
    Answers,
    RepeatingPolicy,
    ThresholdPolicy,
    World,
    answer,
    by_policy,
    divergence,
    grade,
)
from proxy.checkpoint import identify, load
from training import dpo, online, proxy_dpo, proxy_ppo, reward_model, rlhf_ppo
from training.data import read_rows
from training.models import Conversations, end_ids, load_model
from training.policy import Decoding, Policy
from training.rewards import Frozen, Reward, Sample, load_reward
from training.updates import start
from training.world import __main__ as world_files
from training.world import gold

Choose = Callable[[Setting], Any]
"""Says the settings of a method, once the jobs of its search are done."""
DECODING = Decoding()
SEED_OF_THE_WORLD = 0  # the frozen LLM was made with it, and has not seen its held-out prompts


def open_world(setting: Setting, split: str) -> World:
    model, tokenizer = load_model(str(setting.model), dtype=torch.bfloat16)
    model.eval()
    rows = read_rows(setting.data(f"prompts_{split}"), ("prompt",))[: setting.num_test]
    chats = Conversations(tokenizer)
    return World(
        model,
        tokenizer,
        end_ids(model, tokenizer),
        [row["prompt"][-1]["content"] for row in rows],
        [chats.prompt_ids(row["prompt"]) for row in rows],
    )


def frozen_texts(setting: Setting, split: str, seed: int) -> list[str]:
    return json.loads((setting.directory(f"frozen/{seed}") / f"{split}.json").read_text())


def graded(
    setting: Setting,
    world: World,
    answers: Answers,
    seed: int,
    policy: Policy,
    decoding: Decoding = DECODING,
    split: str = "test",
) -> dict[str, Any]:
    """The figures of a row of the table."""
    figures = grade(world, answers, frozen_texts(setting, split, seed))
    some = answers.responses[: setting.num_divergence]
    kl, error = divergence(world, some, policy, decoding)
    return figures | {"kl": kl, "kl_se": error, "kl_prompts": len(some)}


def noise(row: str, seed: int) -> int:
    """A seed for a row's answers that no other row has."""
    return 1000 * (1 + NOISE.index(row)) + seed


NOISE = (
    *("frozen", "frozen, again", "top-p 0.8", "top-p 0.6", "greedy"),
    *("tuned", "proxy", "threshold", "best of", "proxy best of", "decodings"),
)


def make_world(setting: Setting, directory: Path) -> dict[str, Any]:
    options = world_files.Options(
        output=directory,
        overwrite=True,
        seed=SEED_OF_THE_WORLD,
        num_sft=1,
        num_preferences=setting.num_pairs,
        num_held_out=setting.num_test,
    )
    world_files.main(options)
    return {"prompts": options.num_prompts, "pairs": options.num_preferences}


def make_frozen(seed: int) -> Job:
    """The answers that all others are compared with, and the frozen LLM under other decodings."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        for split in ("validation", "test"):
            world = open_world(setting, split)
            roll_out = by_policy(world, Policy(world.model), DECODING)
            texts = answer(world, noise("frozen", seed), roll_out).texts
            (directory / f"{split}.json").write_text(json.dumps(texts))
        rows = {
            "frozen, again": DECODING,
            "top-p 0.8": replace(DECODING, top_p=0.8),
            "top-p 0.6": replace(DECODING, top_p=0.6),
            "greedy": replace(DECODING, temperature=0.0),
        }
        result = {}
        for name, decoding in rows.items():
            policy = Policy(world.model)
            answers = answer(world, noise(name, seed), by_policy(world, policy, decoding))
            result[name] = graded(setting, world, answers, seed, policy, decoding)
        return {"rows": result}

    return Job(f"frozen/{seed}", run, ("world",))


def make_reward(kind: str, seed: int, num_pairs: int | None = None) -> Job:
    """Of all pairs, or of so many of them; jobs know the latter as the reward `<kind>-<num_pairs>`."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with timed(result):
            reward_model.main(
                reward_model.Options(
                    model=str(setting.model),
                    preferences=str(_some_pairs(setting, directory, num_pairs, seed)),
                    output=directory / "model" if num_pairs else directory,
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
    """Over so many pairs; fewer want more of them."""
    return 1.0 if num_pairs is None else max(1.0, min(20.0, 12_000 / num_pairs))


def _needs(reward: str, seed: int) -> tuple[str, ...]:
    return (
        f"frozen/{seed}",
        *(() if reward == "self-judge" else (f"reward-{reward}/{seed}",)),
    )


def _reward(setting: Setting, reward: str, seed: int) -> str:
    if reward == "self-judge":
        return reward
    directory = setting.directory(f"reward-{reward}/{seed}")
    return str(directory / "model" if reward[-1].isdigit() else directory)


def updates(trainer: online.Trainer, steps: int, result: dict[str, Any]) -> None:
    """All updates of a PPO run; what gold says of each rollout is written down beside its reward."""
    scored, curve = trainer.reward, []

    def watched(samples: Any) -> Tensor:
        golds.extend(gold.score(s.messages[-1]["content"], s.text) for s in samples)
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
    trainer_class: type[proxy_ppo.Trainer],
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
    start_from: str | None = None,
    **settings: Any,
) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = proxy_ppo.Options(
            model=str(setting.model),
            reward=_reward(setting, reward, seed),
            prompts=setting.data("prompts"),
            output=directory,
            steps=setting.updates(choose(setting)),
            episodes=setting.episodes,
            start_from=setting.directory(start_from) / "proxy" if start_from else None,
            seed=seed,
            **settings,
        )
        result: dict[str, Any] = {"updates": options.steps}
        with timed(result):
            trainer = trainer_class(options, start())
            updates(trainer, options.steps, result)
        result["parameters"] = trainer.network.num_parameters()
        world = open_world(setting, split)
        if isinstance(trainer, LiteralTrainer):
            answers = answer(world, noise("proxy", seed), trainer.roll_out)
            return result | {"row": grade(world, answers, frozen_texts(setting, split, seed))}
        trainer.save({"options": {}, "last": result["curve"][-1]})
        policy = trainer.policy_class(world.model, trainer.network)
        answers = answer(world, noise("proxy", seed), by_policy(world, policy, options.decoding))
        row = graded(setting, world, answers, seed, policy, options.decoding, split)
        return result | {"row": row}

    more = (start_from,) if start_from else ()
    return Job(name, run, (*_needs(reward, seed), *needs, *more))


def make_direct(
    name: str, seed: int, num_pairs: int | None = None, rounds: int = 0, **settings: Any
) -> Job:
    """A proxy straight from pairs, or, where there are rounds, from prompts and the implicit reward."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        data: dict[str, Any]
        if rounds:
            data = {
                "prompts": setting.data("prompts"),
                "max_rows": max(16, int(1000 * setting.scale)),
                "reward": _reward(setting, "implicit", seed),
                "rounds": rounds,
            }
        else:
            data = {"preferences": str(_some_pairs(setting, directory, num_pairs, seed))}
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
        world = open_world(setting, "test")
        loaded = load(options.output, base=identify(str(setting.model)))
        result["parameters"] = loaded.network.num_parameters()
        policy = Policy(world.model, loaded.network)
        answers = answer(world, noise("proxy", seed), by_policy(world, policy, DECODING))
        return result | {"row": graded(setting, world, answers, seed, policy)}

    needs = _needs("implicit", seed) if rounds else (f"frozen/{seed}",)
    return Job(f"{name}/{seed}", run, needs)


def _some_pairs(setting: Setting, directory: Path, count: int | None, seed: int) -> Path:
    """A file of so many of the pairs, drawn by the seed; None = all of them."""
    source = Path(setting.data("preferences"))
    if count is None:
        return source
    lines = source.read_text().splitlines()
    some = random.Random(seed).sample(lines, min(count, len(lines)))
    path = directory / "preferences.jsonl"
    path.write_text("".join(line + "\n" for line in some))
    return path


class RepeatingTrainer(proxy_ppo.Trainer):
    """Trains a proxy that is asked again about what it rejected."""

    policy_class = RepeatingPolicy


def make_threshold(seed: int) -> Job:
    """The one-pass proxy, accepting where a ≥ 1/2."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        network = load(
            setting.directory(f"proxy-implicit/{seed}"), base=identify(str(setting.model))
        ).network
        policy = ThresholdPolicy(world.model, network)
        answers = answer(world, noise("threshold", seed), by_policy(world, policy, DECODING))
        return {"row": graded(setting, world, answers, seed, policy)}

    return Job(f"threshold/{seed}", run, (f"proxy-implicit/{seed}",))


def tuned(setting: Setting, directory: Path, seed: int, split: str) -> dict[str, Any]:
    """A model with weights of its own, as trained into the directory."""
    world = open_world(setting, split)
    policy = Policy(load_model(str(directory), dtype=torch.bfloat16)[0].eval())
    answers = answer(world, noise("tuned", seed), by_policy(world, policy, DECODING))
    return graded(setting, world, answers, seed, policy, split=split)


def make_dpo(
    name: str,
    seed: int,
    choose: Choose,
    needs: tuple[str, ...] = (),
    split: str = "test",
    file: str = "world/preferences.jsonl",
    num_pairs: int | None = None,
) -> Job:
    """On the file's pairs, or on so many of the world's."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        learning_rate, beta = choose(setting)
        result: dict[str, Any] = {"learning_rate": learning_rate, "beta": beta}
        pairs = (
            _some_pairs(setting, directory, num_pairs, seed) if num_pairs else setting.work / file
        )
        options = dpo.Options(
            model=str(setting.model),
            preferences=str(pairs),
            output=directory / "model" if num_pairs else directory,
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
        result["parameters"] = load_model(str(options.output))[0].num_parameters()
        return result | {"row": tuned(setting, options.output, seed, split)}

    return Job(name, run, (f"frozen/{seed}", *needs))


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
            reward=_reward(setting, reward, seed),
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
            trainer = rlhf_ppo.Trainer(options, start())
            updates(trainer, options.steps, result)
        result["parameters"] = sum(p.numel() for p in trainer.learner.parameters())
        trainer.save({})
        return result | {"row": tuned(setting, directory, seed, split)}

    return Job(name, run, (*_needs(reward, seed), *needs))


class Ranked(NamedTuple):
    """N samples of each of P prompts."""

    answers: list[Answers]  # N of them
    scores: Tensor  # [N, P], by the reward
    cpu_seconds: float


def reward_of(setting: Setting, seed: int, world: World) -> Reward:
    """The implicit reward model of a seed."""
    base = identify(str(setting.model))
    frozen = Frozen(world.model, world.tokenizer, base, DECODING, world.end_ids, 64)
    return load_reward(_reward(setting, "implicit", seed), frozen)


def ranked_samples(
    world: World, policy: Policy, decoding: Decoding, reward: Reward, count: int, key: int
) -> Ranked:
    """`count` samples of each prompt, scored; `key` and every tenth number after it seed their noise."""
    all_answers, scores, cpu = [], [], 0.0
    for number in range(count):
        answers = answer(world, key + 10 * number, by_policy(world, policy, decoding))
        rows = zip(world.texts, world.prompts, answers.texts, answers.responses, strict=True)
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
    """The best of the first `size` samples of each prompt."""
    best = ranked.scores[:size].argmax(0).tolist()
    last = ranked.answers[-1]
    return replace(
        last,
        texts=[ranked.answers[sample].texts[i] for i, sample in enumerate(best)],
        cpu_seconds=ranked.cpu_seconds * size / len(ranked.answers),
    )


def make_best_of(name: str, seed: int, proxy: str | None, sizes: tuple[int, ...]) -> Job:
    """The best of N by the implicit reward model; the smaller N take the first of the same samples."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        world = open_world(setting, "test")
        base = identify(str(setting.model))
        network = load(setting.directory(proxy), base=base).network if proxy else None
        policy, reward = Policy(world.model, network), reward_of(setting, seed, world)
        key = noise("proxy best of" if proxy else "best of", seed)
        ranked = ranked_samples(world, policy, DECODING, reward, max(sizes), key)
        frozen = frozen_texts(setting, "test", seed)
        return {"rows": {f"best of {n}": grade(world, best_of(ranked, n), frozen) for n in sizes}}

    needs = (*_needs("implicit", seed), *((proxy,) if proxy else ()))
    return Job(f"{name}/{seed}", run, needs)
