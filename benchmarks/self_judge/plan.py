"""All jobs, and what self-training's settings are chosen from."""

from typing import Any

from benchmarks.jobs import Job
from benchmarks.proxy_rlhf import plan as proxy_rlhf
from benchmarks.proxy_rlhf.methods import make_dpo, make_proxy
from benchmarks.proxy_rlhf.plan import DPO_SEARCH, FORMS, PROXY_SEARCH, chosen, fixed
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
    {"learning_rate": 5e-5, "beta": 0.1, "steps": 40, "soft_labels": False},
    {"learning_rate": 1e-4, "beta": 0.5, "steps": 60, "soft_labels": False},
    {"learning_rate": 1.5e-4, "beta": 0.1, "steps": 60, "soft_labels": True},
    {"learning_rate": 1.5e-4, "beta": 0.2, "steps": 60, "soft_labels": True},
    {"learning_rate": 3e-4, "beta": 0.3, "steps": 60, "soft_labels": True},
]
TEACHERS = ("judge", "more")
"""Judges that train a model or a proxy."""
BY_ALL, BY_SOME = tuple(JUDGES), tuple(JUDGES)[1:5]
SPEAKERS = {
    "frozen": (SAMPLES, BY_ALL),
    "proxy-implicit": (8, BY_SOME),
    "proxy-judge": (8, BY_SOME),
    "proxy-more": (8, BY_SOME),
    "self-training-more": (8, BY_SOME),
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
    best = {}
    for judge in TEACHERS:
        names = searches(judge)
        for name, settings in zip(names, SELF_TRAINING, strict=True):
            add(make_self_training(name, judge, seeds[0], fixed(settings), (), "validation"))
        best[judge] = chosen([[name] for name in names], SELF_TRAINING)
    best_dpo, dpo_search = chosen(proxy_rlhf.searches("dpo", seeds), DPO_SEARCH)
    updates, their_search = chosen(proxy_rlhf.searches("proxy", seeds), PROXY_SEARCH)
    for seed in seeds:
        for name in BORROWED:
            add(theirs[f"{name}/{seed}"])
        for judge in TEACHERS:
            name = f"proxy-{judge}/{seed}"
            add(make_proxy(name, judge, seed, FORMS["proxy"], updates, their_search))
            name = f"self-training-{judge}/{seed}"
            add(make_self_training(name, judge, seed, *best[judge], "test"))
        add(
            make_dpo(f"dpo-more/{seed}", seed, best_dpo, ("more", *dpo_search), file=f"more/{MORE}")
        )
        add(make_judged(seed))
        for speaker, (size, judges) in SPEAKERS.items():
            add(make_samples(speaker, seed, size))
            add(make_best_of(speaker, seed, judges))
        add(make_strategies(seed, num_prompts=200))
    return list(jobs.values())


def searches(judge: str) -> list[str]:
    """The jobs of each of self-training's settings, of the first seed."""
    return [f"self-training-search-{judge}/{i}" for i in range(len(SELF_TRAINING))]
