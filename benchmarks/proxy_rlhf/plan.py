"""All jobs, and what the baselines' settings are chosen from."""

from collections.abc import Callable
from typing import Any

from benchmarks.proxy_rlhf.jobs import Job, Setting
from benchmarks.proxy_rlhf.literal import LiteralTrainer
from benchmarks.proxy_rlhf.methods import (
    RepeatingTrainer,
    make_best_of,
    make_dpo,
    make_frozen,
    make_proxy,
    make_reward,
    make_rlhf,
    make_threshold,
    make_world,
)
from training import proxy_ppo
from training.policy import Decoding

REWARDS = ("implicit", "scalar", "self-judge")
BEST_OF = (2, 4, 8, 16)
SKAM: dict[str, dict[str, Any]] = {
    "without the nucleus": {"max_candidates": 64, "decoding": Decoding(top_k=0, top_p=1.0)},
    "with repeats": {},
    "without a limit": {"max_rejections": 16},
}
"""Options of the proxy without one of SKAM's parts; repeats need a law of their own."""
DPO_SEARCH = [(1e-4, 0.05), (1e-4, 0.5), (3e-5, 0.1), (3e-5, 0.5), (1e-5, 0.1)]
RLHF_SEARCH = [(2e-5, 0.02), (2e-5, 0.1), (1e-4, 0.02), (5e-5, 0.1), (5e-5, 0.5)]


def all_jobs(seeds: tuple[int, ...]) -> list[Job]:
    """In the order in which they are begun, where what they need is done."""
    one_pass = proxy_ppo.Trainer
    dpo_search = tuple(f"dpo-search/{i}" for i in range(len(DPO_SEARCH)))
    rlhf_search = tuple(f"rlhf-search/{i}" for i in range(len(RLHF_SEARCH)))
    jobs = [Job("world", make_world)]
    for seed in seeds:
        jobs += [
            make_frozen(seed),
            make_reward("implicit", seed),
            make_proxy("proxy-implicit", "implicit", seed, one_pass),
        ]
    for i, name in enumerate(rlhf_search):
        choose = _fixed(RLHF_SEARCH[i])
        jobs.append(make_rlhf(name, "implicit", seeds[0], "validation", choose, ()))
    for i, name in enumerate(dpo_search):
        jobs.append(make_dpo(name, seeds[0], "validation", _fixed(DPO_SEARCH[i]), ()))
    for seed in seeds:
        jobs.append(
            make_dpo(f"dpo/{seed}", seed, "test", _best("dpo-search", DPO_SEARCH), dpo_search)
        )
        for reward in REWARDS:
            chosen = _best("rlhf-search", RLHF_SEARCH)
            name = f"rlhf-{reward}/{seed}"
            jobs += [
                *([make_reward(reward, seed)] if reward == "scalar" else []),
                make_rlhf(name, reward, seed, "test", chosen, rlhf_search),
                make_proxy(f"literal-{reward}", reward, seed, LiteralTrainer),
                *(
                    []
                    if reward == "implicit"
                    else [make_proxy(f"proxy-{reward}", reward, seed, one_pass)]
                ),
            ]
        jobs += [
            make_threshold(seed),
            make_best_of("best-of", seed, None, BEST_OF),
            make_best_of("proxy-best-of", seed, f"proxy-implicit/{seed}", (8,)),
            make_proxy("proxy-without-logprob", "implicit", seed, one_pass, use_logprob=False),
        ]
        for part, settings in SKAM.items():
            trainer = RepeatingTrainer if part == "with repeats" else one_pass
            name = "skam-" + part.replace(" ", "-")
            jobs.append(make_proxy(name, "implicit", seed, trainer, **settings))
    return jobs


def _fixed(value: tuple[float, float]) -> Callable[[Setting], tuple[float, float]]:
    return lambda setting: value


def _best(prefix: str, grid: list[tuple[float, float]]) -> Callable[[Setting], Any]:
    """The settings that won most on the validation prompts."""

    def choose(setting: Setting) -> tuple[float, float]:
        rates = [setting.result(f"{prefix}/{i}")["row"]["win_rate"] for i in range(len(grid))]
        return grid[rates.index(max(rates))]

    return choose
