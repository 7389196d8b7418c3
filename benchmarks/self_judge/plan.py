"""All jobs, and what self-training's settings are chosen from."""

from typing import Any

from benchmarks.jobs import Job
from benchmarks.proxy_rlhf import plan as proxy_rlhf
from benchmarks.proxy_rlhf.methods import make_proxy
from benchmarks.proxy_rlhf.plan import FORMS, PROXY_SEARCH, chosen, fixed, searches
from benchmarks.self_judge.judges import JUDGES
from benchmarks.self_judge.methods import (
    MORE,
    SAMPLES,
    make_best_of,
    make_judge,
    make_judged,
    make_likelihood,
    make_more,
    make_samples,
    make_self_training,
    make_strategies,
)

JUDGE: dict[str, Any] = {"lora_rank": 32, "learning_rate": 1e-3}
LIKELIHOOD: dict[str, Any] = {"lora_rank": 32, "learning_rate": 1e-3}
SELF_TRAINING: list[dict[str, Any]] = [
    {"learning_rate": 5e-5, "steps": 40},
    {"learning_rate": 1.5e-4, "steps": 40},
]
BY_ALL, BY_SOME = tuple(JUDGES), tuple(JUDGES)[1:5]
SPEAKERS = {
    "frozen": (SAMPLES, BY_ALL),
    "proxy-implicit": (8, BY_SOME),
    "proxy-judge": (8, BY_SOME),
    "self-training": (8, BY_SOME),
}
"""Whose answers the judges choose from, how many, and which judges: asking costs much more than scoring."""
BORROWED = (
    *("dpo", "rlhf-implicit", "rlhf-self-judge"),
    *("proxy-implicit", "proxy-scalar", "proxy-self-judge"),
)
"""What the Proxy-RLHF comparison trains, and this one shows beside its own."""


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    """In the order in which they are begun, where what they need is done."""
    theirs = {job.name: job for job in proxy_rlhf.all_jobs(seeds)}
    jobs: dict[str, Job] = {}

    def add(job: Job) -> None:
        """After what it needs of the other comparison's."""
        for name in job.needs:
            if name not in jobs and name in theirs:
                add(theirs[name])
        jobs[job.name] = job

    add(Job("more", make_more))
    for seed in seeds:
        add(make_judge(seed, **JUDGE))
        for name, file, needed in (
            ("likelihood", "world/preferences.jsonl", "world"),
            ("more", f"more/{MORE}", "more"),
        ):
            add(make_likelihood(f"reward-{name}/{seed}", seed, file, (needed,), **LIKELIHOOD))
    names = [f"self-training-search/{i}" for i in range(len(SELF_TRAINING))]
    for name, settings in zip(names, SELF_TRAINING, strict=True):
        add(make_self_training(name, seeds[0], fixed(settings), (), "validation"))
    best, searched = chosen([[name] for name in names], SELF_TRAINING)
    updates, their_search = chosen(searches("proxy", seeds), PROXY_SEARCH)
    for seed in seeds:
        for name in BORROWED:
            add(theirs[f"{name}/{seed}"])
        add(make_self_training(f"self-training/{seed}", seed, best, searched, "test"))
        for reward in ("judge", "more"):
            name = f"proxy-{reward}/{seed}"
            add(make_proxy(name, reward, seed, FORMS["proxy"], updates, their_search))
        add(make_judged(seed))
        for speaker, (size, judges) in SPEAKERS.items():
            add(make_samples(speaker, seed, size))
            add(make_best_of(speaker, seed, judges))
        add(make_strategies(seed, num_prompts=300))
    return list(jobs.values())
