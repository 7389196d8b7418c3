"""All jobs. The settings of what a judge trains were chosen by hand on validation prompts."""

from typing import Any

from benchmarks.jobs import Job
from benchmarks.proxy_rlhf import plan as proxy_rlhf
from benchmarks.proxy_rlhf.methods import make_dpo, make_proxy
from benchmarks.proxy_rlhf.plan import DPO_SEARCH, FORMS, PROXY_SEARCH, chosen
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

LORA: dict[str, Any] = {"lora_rank": 32, "learning_rate": 1e-3}
"""Of all judges that are one."""
SELF_TRAINING: dict[str, Any] = {
    "learning_rate": 1.5e-4,
    "beta": 0.2,
    "steps": 60,
    "soft_labels": True,
}
TEACHERS = ("judge", "more")
"""Judges that train a model or a proxy."""
BY_SOME = ("self-judge, LoRA", "likelihood ratio, LoRA, more data", "implicit reward")
SPEAKERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "frozen": (SAMPLES, tuple(JUDGES)),
    "proxy-implicit": (8, BY_SOME),
    "proxy-judge": (8, BY_SOME),
    "proxy-more": (8, BY_SOME),
    "self-training-more": (8, BY_SOME),
}
"""Whose answers the judges choose from, how many, and which judges."""
BORROWED = (
    *("dpo", "rlhf-implicit", "rlhf-self-judge"),
    *("proxy-implicit", "proxy-scalar", "proxy-self-judge"),
)
"""What the Proxy-RLHF comparison trains, and this one shows beside its own."""


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    """Seed by seed, each job after what it needs."""
    theirs = {job.name: job for job in proxy_rlhf.all_jobs(seeds)}
    jobs: dict[str, Job] = {}

    def add(job: Job) -> None:
        """After what it needs of the other comparison's."""
        for name in job.needs:
            if name not in jobs and name in theirs:
                add(theirs[name])
        jobs[job.name] = job

    best_dpo, dpo_search = chosen(proxy_rlhf.searches("dpo", seeds), DPO_SEARCH)
    updates, proxy_search = chosen(proxy_rlhf.searches("proxy", seeds), PROXY_SEARCH)
    ours, more = "world/preferences.jsonl", f"more/{MORE}"
    add(Job("more", make_more))
    for seed in seeds:
        add(make_likelihood(f"reward-more/{seed}", seed, more, ("more",), **LORA))
        add(make_judge(seed, **LORA))
        add(make_likelihood(f"reward-likelihood/{seed}", seed, ours, ("world",), **LORA))
        for name in BORROWED:
            add(theirs[f"{name}/{seed}"])
        for judge in TEACHERS:
            name = f"proxy-{judge}/{seed}"
            add(make_proxy(name, judge, seed, FORMS["proxy"], updates, proxy_search))
            add(make_self_training(judge, seed, **SELF_TRAINING))
        add(make_judged(seed))
        for speaker, (size, judges) in SPEAKERS.items():
            add(make_samples(speaker, seed, size))
            add(make_best_of(speaker, seed, judges))
        add(make_strategies(seed, num_prompts=200))
    for seed in seeds:
        add(make_dpo(f"dpo-more/{seed}", seed, best_dpo, ("more", *dpo_search), file=more))
    return list(jobs.values())
