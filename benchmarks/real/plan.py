"""All jobs, in the order in which they start as soon as the jobs that they need are finished."""

from pathlib import Path
from typing import Any

from benchmarks.comparison.jobs import Job
from benchmarks.real.data import make_data
from benchmarks.real.evaluation import test_job, test_jobs
from benchmarks.real.methods import METHODS, chosen, seeds_of
from benchmarks.real.opinions import REWARD, SECOND_HELPFUL, SECOND_PROBE
from benchmarks.real.policies import load_frozen
from benchmarks.real.rewards import (
    make_jsft,
    make_probe,
    pair_judge,
    reward_job,
    share_right,
)
from benchmarks.real.setting import COHERENCE_WEIGHT, Setting
from benchmarks.real.trainings import (
    make_coherent_proxy,
    make_dpo,
    make_proxy,
    make_proxy_ppo,
    make_rlhf,
    make_self_training,
)
from benchmarks.real.words import make_second_words
from training.data import PAIR, read_rows

PROBES = ("probe", "coherent", SECOND_PROBE)
"""Judges that read the held-out pairs in one pass."""


def all_jobs(setting: Setting) -> list[Job]:
    """The jobs of the chosen rows, and those that they need.

    Raises:
        TrainingError: a row is unknown or cannot be run.
    """
    methods = chosen(setting)
    jobs = [
        Job("data", make_data),
        make_probe(REWARD, "pairs_a"),
        make_probe(SECOND_PROBE, "pairs_b", other_layers=True),
        make_probe("reward-coherent", "pairs_a", coherence_weight=COHERENCE_WEIGHT),
        make_second_words(),
        make_jsft(),
    ]
    if setting.helpful_pairs is not None:
        jobs.append(make_probe(SECOND_HELPFUL, "helpful_b", other_layers=True))
    for seed in setting.seeds:
        jobs += [
            make_dpo(seed),
            make_proxy_ppo(seed),
            make_coherent_proxy(seed),
            *(make_proxy(reward, seed) for reward in ("probe", "implicit", "jsft")),
            make_rlhf(seed),
            make_self_training(seed),
        ]
    # Of all rows: a chosen one may share the search and the samples of another.
    jobs += [job for name in METHODS for job in test_jobs(name, setting)]
    probes = [name for name in PROBES if name != "coherent" or "proxy-coherent" in methods]
    judges = [method.judge for method in methods.values() if method.judge]
    jobs.append(make_accuracy(list(dict.fromkeys([*probes, *judges])), setting.seeds[0]))
    wanted = {
        "accuracy",
        *(
            test_job(name, seed)
            for name, method in methods.items()
            for seed in seeds_of(setting, method)
        ),
    }
    return _with_needs(jobs, wanted)


def make_accuracy(judges: list[str], seed: int) -> Job:
    """How often each reward, opinion and judge is right about pairs of the test prompts."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        rows = read_rows(setting.data("pairs_test"), PAIR)
        shares = {}
        for judge in judges:
            frozen = load_frozen(setting)  # of its own: a LoRA stays loaded on it
            some = rows if judge in PROBES else rows[: setting.num_costly]
            share, error = share_right(pair_judge(setting, judge, seed, frozen), some)
            shares[judge] = {"share": share, "se": error, "pairs": len(some)}
        return {"judges": shares}

    needs = [reward_job(judge, seed) for judge in judges if judge != "self"]
    return Job("accuracy", run, ("data", *needs))


def _with_needs(jobs: list[Job], wanted: set[str]) -> list[Job]:
    """The wanted jobs and those that they need, in their order."""
    by_name = {job.name: job for job in jobs}
    missing, kept = {*wanted}, set[str]()
    while missing:
        name = missing.pop()
        kept.add(name)
        missing |= {*by_name[name].needs} - kept
    return [job for job in jobs if job.name in kept]
