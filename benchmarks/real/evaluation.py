"""Jobs that search a method's decoding, and that answer the test prompts and score the answers."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.answers import EvaluationSet, divergence
from benchmarks.comparison.jobs import Job
from benchmarks.real.choosing import Responses, load_choice
from benchmarks.real.methods import METHODS, Method, seeds_of
from benchmarks.real.opinions import REWARD, Opinions, opinion_jobs, probe_scores
from benchmarks.real.policies import (
    LoadedPolicy,
    load_frozen,
    noise_key,
    open_policy,
    read_test_prompts,
)
from benchmarks.real.rewards import reward_job, reward_path
from benchmarks.real.setting import DECODING, SETS, Setting
from training.policy import Decoding, Policy
from training.prompts import Prompt, samples_of
from training.reward_loading import load_reward
from training.rewards import Frozen, ProbeReward

GRID = [
    replace(DECODING, temperature=temperature, top_p=top_p)
    for temperature, top_p in product((0.3, 0.7, 1.0), (0.8, 0.95, 1.0))
]
_KL_BATCH = 8


def leader(name: str) -> str:
    """The row whose decoding, and whose samples for best of N, this row has."""
    return METHODS[name].searched_as or name


def search_job(name: str) -> str:
    return f"search/{leader(name)}"


def samples_job(name: str, seed: int) -> str:
    return f"samples/{leader(name)}/{seed}"


def test_job(name: str, seed: int) -> str:
    return f"test/{name}/{seed}"


def trained_by(method: Method, seed: int) -> list[str]:
    return [] if method.job is None else [f"{method.job}/{seed}"]


def make_search(name: str, setting: Setting) -> Job:
    """All decodings of the grid, by the probe that methods are trained on, with the first seed."""
    method, seed = METHODS[name], setting.seeds[0]

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        frozen = load_frozen(setting)
        prompts = read_test_prompts(setting, "validation", frozen.tokenizer)
        probe = load_reward(str(reward_path(setting, "probe", 0)), frozen)
        assert isinstance(probe, ProbeReward)
        size = setting.samples if method.judge else 1
        rows = []
        with open_policy(setting, method, seed, frozen, prompts) as policy:
            for decoding in GRID:
                drawn = _samples(policy, prompts, decoding, noise_key(name, seed), size)
                # All at once: a prompt is then read once for all of its responses.
                samples = samples_of(frozen.tokenizer, prompts * size, [*chain(*drawn)])
                scores = torch.tensor(probe_scores({"probe": probe}, samples, frozen)["probe"])
                scores = scores.view(size, -1).amax(0)
                rows.append(asdict(decoding) | {"reward": scores.mean().item()})
        return {"rows": rows, "prompts": len(prompts)}

    return Job(search_job(name), run, ("data", REWARD, *trained_by(method, seed)))


def decoding_of(setting: Setting, name: str) -> Decoding:
    """The one that the method has, or the one with the highest reward."""
    given = METHODS[name].decoding
    if given is not None:
        return given
    rewards = [row["reward"] for row in setting.result(search_job(name))["rows"]]
    return GRID[rewards.index(max(rewards))]


def make_samples(name: str, seed: int) -> Job:
    """N samples for each test prompt, which all judges choose from."""
    method = METHODS[name]

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        frozen, decoding = load_frozen(setting), decoding_of(setting, name)
        sets = {part: read_test_prompts(setting, part, frozen.tokenizer) for part in SETS}
        with open_policy(setting, method, seed, frozen, [*chain(*sets.values())]) as policy:
            start = time.process_time()
            drawn = {
                part: _samples(policy, prompts, decoding, _key(name, seed, part), setting.samples)
                for part, prompts in sets.items()
            }
            cpu = time.process_time() - start
        (directory / "samples.json").write_text(json.dumps(drawn), encoding="utf-8")
        return {"cpu_seconds": cpu}

    return Job(samples_job(name, seed), run, (search_job(name), *trained_by(method, seed)))


def make_test(name: str, seed: int, setting: Setting) -> Job:
    """A method's answers to the test prompts with their scores, in `answers.json` and `scores.json`."""
    method = METHODS[name]

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        frozen, decoding = load_frozen(setting), decoding_of(setting, name)
        sets = {part: read_test_prompts(setting, part, frozen.tokenizer) for part in SETS}
        answer = _choose if method.judge else _answer
        responses, figures = answer(setting, name, seed, frozen, sets, decoding)
        opinions, texts, scores = Opinions(setting, frozen), {}, {}
        for part, prompts in sets.items():
            samples = samples_of(frozen.tokenizer, prompts, responses[part])
            texts[part] = [sample.text for sample in samples]
            scores[part] = opinions.of(samples)
        (directory / "answers.json").write_text(json.dumps(texts), encoding="utf-8")
        (directory / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
        tokens = {part: [len(response) for response in responses[part]] for part in sets}
        return {"decoding": asdict(decoding), "tokens": tokens, **figures}

    needs = ["data", *opinion_jobs(setting)]
    if method.decoding is None:
        needs.append(search_job(name))
    if method.judge:
        needs.append(samples_job(name, seed))
        if method.judge != "self":
            needs.append(reward_job(method.judge, seed))
    return Job(test_job(name, seed), run, (*needs, *trained_by(method, seed)))


def _answer(
    setting: Setting,
    name: str,
    seed: int,
    frozen: Frozen,
    sets: dict[str, list[Prompt]],
    decoding: Decoding,
) -> tuple[dict[str, Responses], dict[str, Any]]:
    """One response to each prompt, the CPU time, and the divergence from the frozen LLM."""
    everything = [*chain(*sets.values())]
    with open_policy(setting, METHODS[name], seed, frozen, everything) as policy:
        start, responses = time.process_time(), {}
        for part, prompts in sets.items():
            (responses[part],) = _samples(policy, prompts, decoding, _key(name, seed, part), 1)
        cpu = time.process_time() - start
        few = sets["harmful"][: setting.num_costly]
        plain = [prompt.ids for prompt in few]
        kl, error = divergence(
            EvaluationSet(frozen.model, frozen.tokenizer, frozen.end_ids, [], plain),
            responses["harmful"][: len(few)],
            Policy(policy.model, policy.network),
            decoding,
            prompts=policy.read(few) if policy.system else None,
            chunk=_KL_BATCH,
        )
    return responses, {"answer_cpu_seconds": cpu, "samples": 1, "kl": kl, "kl_se": error}


def _choose(
    setting: Setting,
    name: str,
    seed: int,
    frozen: Frozen,
    sets: dict[str, list[Prompt]],
    decoding: Decoding,
) -> tuple[dict[str, Responses], dict[str, Any]]:
    """The judge's choice among the samples."""
    judge = METHODS[name].judge
    assert judge is not None
    place = setting.directory(samples_job(name, seed))
    choose = load_choice(setting, judge, seed, load_frozen(setting))  # of its own: a LoRA stays
    drawn: dict[str, list[Responses]] = json.loads((place / "samples.json").read_text())
    start = time.process_time()
    responses = {part: choose(prompts, drawn[part]) for part, prompts in sets.items()}
    cpu = time.process_time() - start
    cpu += setting.result(samples_job(name, seed))["cpu_seconds"]
    return responses, {"answer_cpu_seconds": cpu, "samples": setting.samples}


def _key(name: str, seed: int, part: str) -> int:
    """Of the noise of a row's answers to a set of prompts."""
    return len(SETS) * noise_key(name, seed) + SETS.index(part)


def _samples(
    policy: LoadedPolicy, prompts: Sequence[Prompt], decoding: Decoding, key: int, count: int
) -> list[Responses]:
    """`count` responses to each prompt: [N][P]."""
    responses = policy.respond(policy.read(prompts) * count, decoding, key)
    return [responses[i * len(prompts) : (i + 1) * len(prompts)] for i in range(count)]


def test_jobs(name: str, setting: Setting) -> list[Job]:
    """All jobs of a row but its training."""
    method = METHODS[name]
    jobs = [make_search(name, setting)] if method.decoding is None and leader(name) == name else []
    for seed in seeds_of(setting, method):
        if method.judge and leader(name) == name:
            jobs.append(make_samples(name, seed))
        jobs.append(make_test(name, seed, setting))
    return jobs
