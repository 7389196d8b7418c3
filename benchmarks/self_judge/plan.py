"""All jobs. Settings were chosen on validation prompts: those of DPO and the proxy by the Proxy-RLHF comparison, those
of the judges and of self-training by hand.
"""

from typing import Any

from benchmarks.comparison.jobs import Job
from benchmarks.comparison.trainings import (
    fixed,
    make_dpo,
    make_frozen,
    make_proxy,
    make_reward,
    make_toy_data,
)
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
"""Of all judges that are LoRAs."""
UPDATES = fixed(20)
"""Updates of a proxy."""
DPO = fixed((1e-4, 0.5))
"""Learning rate and β."""
SELF_TRAINING: dict[str, Any] = {
    "learning_rate": 1.5e-4,
    "beta": 0.2,
    "steps": 60,
    "soft_labels": True,
}
TEACHERS = ("implicit", "judge", "more")
"""Judges that train a proxy."""
THREE_JUDGES = ("self-judge, LoRA", "likelihood ratio, LoRA, more data", "implicit reward")
SAMPLING_MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "frozen": (SAMPLES, tuple(JUDGES)),
    **{f"proxy-{teacher}": (8, THREE_JUDGES) for teacher in TEACHERS},
    "self-training-more": (8, THREE_JUDGES),
}
"""The models that the judges choose answers from, the number of answers, and the judges."""


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    """Jobs after those that they need. All jobs of a seed come before the next seed, except DPO, the longest, which no
    other job needs.
    """
    toy_pairs, more_pairs = "world/preferences.jsonl", f"more/{MORE}"
    jobs = [Job("world", make_toy_data), Job("more", make_more)]
    for seed in seeds:
        jobs += [
            make_likelihood(f"reward-more/{seed}", seed, more_pairs, ("more",), **LORA),
            make_judge(seed, **LORA),
            make_likelihood(f"reward-likelihood/{seed}", seed, toy_pairs, ("world",), **LORA),
            make_reward("implicit", seed),
            make_reward("scalar", seed),
            make_frozen(seed),
            *(
                make_proxy(f"proxy-{teacher}/{seed}", teacher, seed, UPDATES)
                for teacher in TEACHERS
            ),
            make_self_training("more", seed, **SELF_TRAINING),
            make_self_training("judge", seed, **SELF_TRAINING),
            make_judged(seed),
        ]
        for sampling_model, (size, judges) in SAMPLING_MODELS.items():
            jobs += [
                make_samples(sampling_model, seed, size),
                make_best_of(sampling_model, seed, judges),
            ]
        jobs.append(make_strategies(seed, num_prompts=200))
    jobs += [make_dpo(f"dpo-more/{seed}", seed, DPO, ("more",), file=more_pairs) for seed in seeds]
    return jobs
