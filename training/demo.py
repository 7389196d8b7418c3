"""Build the bundled demo from nothing: `make demo`, or `python -m training.demo --output deploy/demo`.

This is the project's main path, from top to bottom: data, an untrained model, a base model that answers and judges, two
rewards, two proxies. It takes about 40 minutes on two CPU cores, and twice that without g++, which torch.compile needs.
Stages whose result is already in the work directory are skipped, and a killed training is resumed: run the same command
again. To repeat a stage, delete its directory.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from judge.options import PositiveShare, Seed
from proxy.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from training import base_model, jsft, output, proxy_ppo, reward_model
from training.console import Interrupted, main_guard, read_options
from training.model_card import CARD_FILE
from training.toy_data import files as toy_files

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
PROXY_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
PROXIES = {"aligned": ("preferences.jsonl", 60), "polite": ("preferences_manners.jsonl", 20)}
"""Each proxy: the preferences that it is trained on, and its number of updates. Manners need few updates; more would
fit the noise of a reward that measures nothing else.
"""


@dataclass(frozen=True)
class Options:
    """Output, and size of the run."""

    output: Path = Path("deploy/demo")
    """Directory for `model/` and `proxies/`."""
    work: Path = Path("runs/demo")
    """Directory for the data and all intermediate results."""
    seed: Seed = 0
    """Seed of every stage."""
    scale: PositiveShare = 1.0
    """Share of the data and of the updates, for a quick run of the whole path."""
    overwrite: bool = False
    """Replace the model and the proxies that this command wrote to the output directory."""


def stage(marker: Path, make: Callable[[], None]) -> None:
    """Run one stage, unless the file that it writes last exists."""
    if marker.exists():
        print(f"== {marker.parent.name}: done already")
        return
    print(f"== {marker.parent.name}")
    make()


def main(options: Options) -> None:
    writes = [f"model/{file}" for file in MODEL_FILES]
    writes += [f"proxies/{name}/{file}" for name in PROXIES for file in PROXY_FILES]
    run = partial(output.run, options, "training.demo", reads=())
    try:
        with run(writes=writes) as published:
            with run(writes=(), directory=options.work, resume=True) as work:
                work.start()
                _make(options)
            published.start()
            publish(options.work, options.output)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: finished stages are in {options.work}; the same command continues"
        ) from None


def _make(options: Options) -> None:
    """Run all stages in the work directory."""
    work, seed = options.work, options.seed
    data, untrained, base = work / "world", work / "untrained", work / "base"

    # Compiling takes a minute, and eager attention is faster only when compiled.
    compiles = options.scale >= 1 and shutil.which("g++") is not None

    def scaled(count: int) -> int:
        return max(1, int(count * options.scale))

    stage(
        data / "preferences_test.jsonl",
        lambda: toy_files.main(
            toy_files.Options(
                output=data,
                seed=seed,
                num_sft=scaled(60_000),
                num_preferences=scaled(60_000),
                num_prompts=scaled(8_000),
                num_held_out=scaled(1_000),
                overwrite=True,  # an interrupted stage
            )
        ),
    )
    stage(
        untrained / "tokenizer_config.json",
        lambda: base_model.main(
            base_model.Options(
                corpus=(data / "sft.jsonl", data / "preferences.jsonl"),
                output=untrained,
                overwrite=True,  # an interrupted stage
                seed=seed,
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
                resume=True,
                seed=seed,
            )
        ),
    )

    for name, (preferences, updates) in PROXIES.items():
        _make_proxy(options, name, data / preferences, scaled(12_000), scaled(updates))


def _make_proxy(options: Options, name: str, preferences: Path, pairs: int, updates: int) -> None:
    """A reward from the preferences, and a proxy from the reward."""
    work, base = options.work, options.work / "base"
    reward, proxy = work / f"reward-{name}", work / f"proxy-{name}"
    stage(
        reward / "reward.json",
        lambda: reward_model.main(
            reward_model.Options(
                model=str(base),
                preferences=str(preferences),
                output=reward,
                max_rows=pairs,
                resume=True,
                seed=options.seed,
            )
        ),
    )
    stage(
        proxy / CARD_FILE,
        lambda: proxy_ppo.main(
            proxy_ppo.Options(
                model=str(base),
                reward=str(reward),
                prompts=str(work / "world" / "prompts.jsonl"),
                output=proxy,
                steps=updates,
                resume=True,
                seed=options.seed,
            )
        ),
    )


def publish(work: Path, target: Path) -> None:
    """Copy the files that the server loads."""
    (target / "model").mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copy2(work / "base" / file, target / "model" / file)
    for name in PROXIES:
        proxy = target / "proxies" / name
        proxy.mkdir(parents=True, exist_ok=True)
        for file in PROXY_FILES:
            shutil.copy2(work / f"proxy-{name}" / file, proxy / file)
    print(f"== {target}")


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
