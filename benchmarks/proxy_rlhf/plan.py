"""All jobs, and the grids from which the methods' settings are chosen."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.comparison.jobs import Job, Setting
from benchmarks.comparison.trainings import (
    fixed,
    make_dpo,
    make_frozen,
    make_proxy,
    make_reward,
    make_toy_data,
)
from benchmarks.proxy_rlhf.ablations import RepeatingTrainer, make_threshold
from benchmarks.proxy_rlhf.decodings import decoding_jobs
from benchmarks.proxy_rlhf.literal import make_literal_proxy
from benchmarks.proxy_rlhf.methods import make_best_of, make_direct, make_rlhf
from training.policy import Decoding

REWARDS = ("implicit", "scalar", "self-judge")
BEST_OF = (2, 4, 8, 16)
SKAM: dict[str, dict[str, Any]] = {
    "without the nucleus": {"max_candidates": 64, "decoding": Decoding(top_k=0, top_p=1.0)},
    "with repeats": {"trainer_class": RepeatingTrainer},
    "without a limit": {"max_rejections": 16},
}
"""Options of the proxy without one part of SKAM; repeats need another sampling rule."""
FORMS: dict[str, Callable[..., Job]] = {"literal": make_literal_proxy, "proxy": make_proxy}
DPO_SEARCH = [(1e-4, 0.05), (1e-4, 0.5), (3e-5, 0.1), (3e-5, 0.5), (1e-5, 0.1)]
"""Learning rate and β."""
RLHF_SEARCH = [(2e-5, 0.02), (2e-5, 0.1), (1e-4, 0.02), (5e-5, 0.1), (5e-5, 0.5)]
"""Learning rate and KL weight."""
PROXY_SEARCH = [10, 20, 60]
"""Updates, for both forms of the proxy."""
DIRECT_PAIRS = (30, 100, 300, 1000, 3000)
"""In addition to all of them."""
DIRECT_LOSSES = (("ipo", 0.1), ("simpo", 2.0), ("kto", 0.3))
"""In addition to DPO's, with β."""
DIRECT_ROUNDS = (1, 3)
SEARCHES: dict[str, list[Any]] = {
    "dpo": DPO_SEARCH,
    "rlhf": RLHF_SEARCH,
    "literal": PROXY_SEARCH,
    "proxy": PROXY_SEARCH,
}


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    """In the order in which they start, as soon as the jobs that they need are finished."""
    jobs = [Job("world", make_toy_data)]
    for seed in seeds:
        jobs += [make_frozen(seed), make_reward("implicit", seed)]
    for i, pair in enumerate(RLHF_SEARCH):
        name, choose = f"rlhf-search/{i}", fixed(pair)
        jobs.append(make_rlhf(name, "implicit", seeds[0], choose, split="validation"))
    for i, pair in enumerate(DPO_SEARCH):
        jobs.append(make_dpo(f"dpo-search/{i}", seeds[0], fixed(pair), split="validation"))
    for form, make in FORMS.items():
        for updates, names in zip(PROXY_SEARCH, searches(form, seeds), strict=True):
            for name, seed in zip(names, seeds, strict=True):
                choose = fixed(updates)
                jobs.append(make(name, "implicit", seed, choose, split="validation"))
    tuned = {method: chosen(searches(method, seeds), grid) for method, grid in SEARCHES.items()}
    for seed in seeds:
        jobs.append(make_dpo(f"dpo/{seed}", seed, *tuned["dpo"]))
        for reward in REWARDS:
            if reward == "scalar":
                jobs.append(make_reward(reward, seed))
            jobs.append(make_rlhf(f"rlhf-{reward}/{seed}", reward, seed, *tuned["rlhf"]))
            for form, make in FORMS.items():
                jobs.append(make(f"{form}-{reward}/{seed}", reward, seed, *tuned[form]))
        name = f"proxy-without-logprob/{seed}"
        jobs += [
            make_threshold(seed),
            *direct_jobs(seed),
            make_proxy(
                f"proxy-from-direct/{seed}",
                "implicit",
                seed,
                *tuned["proxy"],
                start_from=f"direct-all/{seed}",
            ),
            make_best_of("best-of", seed, None, BEST_OF),
            make_best_of("proxy-best-of", seed, f"proxy-implicit/{seed}", (8,)),
            make_proxy(name, "implicit", seed, *tuned["proxy"], use_logprob=False),
        ]
        for part, settings in SKAM.items():
            name = f"skam-{part.replace(' ', '-')}/{seed}"
            jobs.append(make_proxy(name, "implicit", seed, *tuned["proxy"], **settings))
    return jobs + decoding_jobs(seeds)


def direct_jobs(seed: int) -> list[Job]:
    """Proxies with DPO: by number of pairs, by loss, and from the LLM's own samples."""
    return [
        make_direct("direct-all", seed),
        *(make_direct(f"direct-{count}", seed, count) for count in DIRECT_PAIRS),
        *(
            make_direct(f"direct-{loss}", seed, loss=loss, beta=beta)
            for loss, beta in DIRECT_LOSSES
        ),
        *(make_direct(f"direct-sampled-{rounds}", seed, rounds=rounds) for rounds in DIRECT_ROUNDS),
    ]


def searches(method: str, seeds: tuple[int, ...]) -> list[list[str]]:
    """The jobs of each of a method's settings.

    The proxies' jobs use all seeds, which together cost about one run of full RLHF; those of the others use the first.
    """
    prefixes = [f"{method}-search/{i}" for i in range(len(SEARCHES[method]))]
    if method not in FORMS:
        return [[prefix] for prefix in prefixes]
    return [[f"{prefix}/{seed}" for seed in seeds] for prefix in prefixes]


def chosen(
    jobs: list[list[str]], grid: list[Any]
) -> tuple[Callable[[Setting], Any], tuple[str, ...]]:
    """The settings with the highest win rate on the validation prompts, and the jobs needed to know them."""

    def choose(setting: Setting) -> Any:
        rates = [
            fmean(setting.result(job)["row"]["win_rate"] for job in same_setting)
            for same_setting in jobs
        ]
        return grid[rates.index(max(rates))]

    return choose, tuple(job for same_setting in jobs for job in same_setting)
