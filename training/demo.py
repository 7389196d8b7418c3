"""Make the bundled demo from nothing: `make demo`, or `python -m training.demo --output deploy/demo`.

This is the project's main path, top to bottom: data, an untrained model, a base model that answers and judges, two
rewards, two proxies. About 40 minutes on two CPU cores; twice that without g++, which torch.compile needs. Stages whose
result is in the work directory already are skipped, so a run that was interrupted goes on; delete a stage's directory
to make it again.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from training import base_model, jsft, proxy_ppo, reward_model
from training.console import main_guard
from training.world import __main__ as world

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
PROXIES = {"aligned": ("preferences.jsonl", 60), "polite": ("preferences_manners.jsonl", 20)}
"""Each proxy: the preferences that it learns from, and its updates. Manners are learned in a few; more would learn the
noise in a reward that knows nothing else."""


@dataclass(frozen=True)
class Options:
    """Where to."""

    output: Path = Path("deploy/demo")
    """Directory that gets `model/` and `proxies/`."""
    work: Path = Path("runs/demo")
    """Directory for the data and all that is made on the way."""
    seed: int = 0
    """Of everything."""
    scale: float = 1.0
    """Share of the data and of the updates, to see the path work in less time."""


def stage(marker: Path, make: Callable[[], None]) -> None:
    """Run one stage unless the file that it writes last is there."""
    if marker.exists():
        print(f"== {marker.parent.name}: done already")
        return
    print(f"== {marker.parent.name}")
    make()


def main(options: Options) -> None:
    work, seed = options.work, options.seed
    data, untrained, base = work / "world", work / "untrained", work / "base"

    # Compiling takes a minute, and eager attention is the faster one only when compiled.
    compiles = options.scale >= 1 and shutil.which("g++") is not None

    def some(count: int) -> int:
        return max(1, int(count * options.scale))

    stage(
        data / "preferences_test.jsonl",
        lambda: world.main(
            world.Options(
                output=data,
                seed=seed,
                num_sft=some(60_000),
                num_preferences=some(60_000),
                num_prompts=some(8_000),
                num_held_out=some(1_000),
            )
        ),
    )
    stage(
        untrained / "tokenizer_config.json",
        lambda: base_model.main(
            base_model.Options(
                corpus=(data / "sft.jsonl", data / "preferences.jsonl"), output=untrained, seed=seed
            )
        ),
    )
    stage(
        base / "tokenizer_config.json",
        lambda: jsft.main(
            jsft.Options(
                model=str(untrained),
                sft=str(data / "sft.jsonl"),
                preferences=(str(data / "preferences.jsonl"),),
                output=base,
                prompt_weight=0.1,
                compile=compiles,
                attention="eager" if compiles else "sdpa",
                seed=seed,
            )
        ),
    )

    def make_proxy(name: str, preferences: Path, updates: int) -> None:
        reward, proxy = work / f"reward-{name}", work / f"proxy-{name}"
        stage(
            reward / "reward.json",
            lambda: reward_model.main(
                reward_model.Options(
                    model=str(base),
                    preferences=str(preferences),
                    output=reward,
                    max_rows=some(12_000),
                    seed=seed,
                )
            ),
        )
        stage(
            proxy / "config.json",
            lambda: proxy_ppo.main(
                proxy_ppo.Options(
                    model=str(base),
                    reward=str(reward),
                    prompts=str(data / "prompts.jsonl"),
                    output=proxy,
                    steps=some(updates),
                    seed=seed,
                )
            ),
        )

    for name, (preferences, updates) in PROXIES.items():
        make_proxy(name, data / preferences, updates)
    publish(work, options.output)


def publish(work: Path, output: Path) -> None:
    """Copy what the server loads."""
    (output / "model").mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copy2(work / "base" / file, output / "model" / file)
    for name in PROXIES:
        target = output / "proxies" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("proxy.safetensors", "config.json"):
            shutil.copy2(work / f"proxy-{name}" / file, target / file)
    print(f"== {output}")


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
