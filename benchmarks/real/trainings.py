"""Jobs that train methods: DPO, full RLHF and SELF-JUDGE as LoRAs, and proxies."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.comparison.jobs import Job, timed
from benchmarks.real.rewards import LORA, reward_job, reward_path, train_implicit
from benchmarks.real.setting import DECODING, TRAINED, Setting
from proxy.checkpoint import WEIGHTS_FILE
from training import proxy_dpo, proxy_ppo, rlhf_ppo, self_judge
from training.policy import Decoding

ROLLOUT_MEMORY = 0.15  # of the RAM, at most
MAX_CANDIDATES = 16


def make_dpo(seed: int) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        result = train_implicit(setting, directory / TRAINED, "pairs_a", seed)
        return result | {"parameters": _stored(directory / TRAINED)}

    return Job(f"dpo/{seed}", run, ("data",))


def make_rlhf(seed: int) -> Job:
    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = rlhf_ppo.Options(
            model=str(setting.model),
            reward=str(reward_path(setting, "probe", seed)),
            prompts=str(setting.data("prompts_a")),
            output=directory / TRAINED,
            overwrite=True,
            steps=setting.updates(10),
            episodes=setting.scaled(64, 8),
            epochs=2,
            lora_rank=LORA["lora_rank"],
            learning_rate=LORA["learning_rate"],
            critic_learning_rate=LORA["learning_rate"],
            kl_weight=0.1,
            decoding=Decoding(top_k=0, top_p=1.0, max_new_tokens=DECODING.max_new_tokens),
            seed=seed,
        )
        return _train(rlhf_ppo.main, options, directory)

    return Job(f"rlhf/{seed}", run, ("data", "reward-probe"))


def make_self_training(seed: int) -> Job:
    """SELF-JUDGE: self-training of a LoRA by the judge that JSFT made of the same LLM."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        steps = setting.updates(10)
        options = self_judge.Options(
            model=str(setting.model),
            judge=str(reward_path(setting, "jsft", seed)),
            prompts=str(setting.data("prompts_a")),
            held_out=str(setting.data("prompts_validation")),
            num_held_out=setting.scaled(16, 2),
            output=directory / TRAINED,
            overwrite=True,
            steps=steps,
            check_every=steps,
            pairs=setting.scaled(32, 4),
            lora_rank=LORA["lora_rank"],
            learning_rate=LORA["learning_rate"],
            soft_labels=True,
            decoding=DECODING,
            # A run that stops early would stop the comparison.
            max_flips=1.0,
            min_diversity=0.0,
            max_length_ratio=100.0,
            seed=seed,
        )
        return _train(self_judge.main, options, directory)

    return Job(f"self-training/{seed}", run, ("data", "reward-jsft"))


def make_proxy_ppo(seed: int) -> Job:
    """A proxy with PPO by the probe."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = _ppo_options(setting, directory, reward="probe", seed=seed)
        return _train(proxy_ppo.main, options, directory)

    return Job(f"proxy-ppo/{seed}", run, ("data", "reward-probe"))


def make_coherent_proxy(seed: int) -> Job:
    """A proxy with PPO by the probe with coherence, on prompts of both kinds."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = replace(
            _ppo_options(setting, directory, reward="coherent", seed=seed),
            prompts=str(setting.data("prompts_both")),
            steps=setting.updates(30),
            # Nearer to the answers' temperature: so training meets the loops that they fall into.
            decoding=replace(DECODING, temperature=0.5),
        )
        return _train(proxy_ppo.main, options, directory)

    return Job(f"proxy-coherent/{seed}", run, ("data", "reward-coherent"))


def _ppo_options(setting: Setting, directory: Path, *, reward: str, seed: int) -> proxy_ppo.Options:
    return proxy_ppo.Options(
        model=str(setting.model),
        reward=str(reward_path(setting, reward, seed)),
        prompts=str(setting.data("prompts_a")),
        output=directory / TRAINED,
        overwrite=True,
        steps=setting.updates(20),
        episodes=setting.scaled(160, 16),
        max_candidates=MAX_CANDIDATES,
        decoding=DECODING,
        rollout=setting.rollout,
        rollout_memory=ROLLOUT_MEMORY,
        seed=seed,
    )


def make_proxy(reward: str, seed: int) -> Job:
    """A proxy with DPO on the frozen LLM's own answers, ranked by the reward."""

    def run(setting: Setting, directory: Path) -> dict[str, Any]:
        options = proxy_dpo.Options(
            model=str(setting.model),
            prompts=str(setting.data("prompts_a")),
            reward=str(reward_path(setting, reward, seed)),
            output=directory / TRAINED,
            overwrite=True,
            max_rows=setting.scaled(600, 8),
            samples=4,
            max_candidates=MAX_CANDIDATES,
            decoding=DECODING,
            rollout=setting.rollout,
            rollout_memory=ROLLOUT_MEMORY,
            seed=seed,
        )
        return _train(proxy_dpo.main, options, directory)

    return Job(f"proxy-{reward}/{seed}", run, ("data", reward_job(reward, seed)))


def _train(main: Callable[[Any], None], options: Any, directory: Path) -> dict[str, Any]:
    """Run a training command; what it took, and how many parameters it saved."""
    result: dict[str, Any] = {}
    with timed(result):
        main(options)
    return result | {"parameters": _stored(directory / TRAINED)}


def _stored(directory: Path) -> int:
    """Parameters of a LoRA or a proxy."""
    path = next(
        path
        for name in ("adapter_model.safetensors", WEIGHTS_FILE)
        for path in [directory / name]
        if path.exists()
    )
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
