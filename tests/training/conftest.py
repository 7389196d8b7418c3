"""One tiny run of the whole training path for all tests of it. No test changes what is shared here."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.conftest import free_port
from tests.warm import Command, run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no curves, which would take seconds. test_metrics.py checks those of all commands."""
    monkeypatch.setattr("training.metrics.draw_curves", lambda rows, path: None)


MakeOnce = Callable[[str, Callable[[Path], None]], Path]
"""(name, a function that fills a directory) -> the directory"""


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Directories that all workers of pytest-xdist share: the first to want one makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def directory_of(name: str, make: Callable[[Path], None]) -> Path:
        directory, is_made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
                make(directory)
                is_made.touch()
        return directory

    return directory_of


@pytest.fixture(scope="session")
def work_dir(make_once: MakeOnce) -> Path:
    """The work directory of `training.demo`, run at 1/200 of its size; `demo/` in it is what it publishes.

    Its LLM is smaller than the demo's: the command skips stages whose result is there.
    """

    def make(output: Path) -> None:
        world, untrained = output / "world", output / "untrained"
        run_command(
            "training.world", "--output", world, "--num-sft", "300", "--num-preferences", "300",
            "--num-prompts", "40", "--num-held-out", "5",
        )  # fmt: skip
        run_command(
            "training.base_model", "--corpus", world / "sft.jsonl", world / "preferences.jsonl",
            "--hidden-size", "64", "--num-layers", "2", "--num-heads", "2", "--intermediate-size", "128",
            "--output", untrained,
        )  # fmt: skip
        run_command(
            "training.demo", "--work", output, "--output", output / "demo", "--scale", "0.005",
            "--overwrite",
        )  # fmt: skip

    return make_once("training", make)


def run_command(*arguments: str | Path) -> None:
    """Run a training command that must succeed."""
    result = run(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def run_on_two_processes(*arguments: str | Path) -> None:
    """Run the command in two processes, with the environment that `torchrun` sets."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    commands = [
        Command(
            *arguments,
            environment=os.environ | address | sizes | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    outputs = [command.communicate() for command in commands]
    assert [command.wait() for command in commands] == [0, 0], outputs


def sft_arguments(work_dir: Path) -> list[str | Path]:
    """A run of 20 steps, in two passes."""
    return [
        "training.sft", "--model", work_dir / "untrained", "--sft", work_dir / "world/sft.jsonl", "--batch-size", "32",
        "--epochs", "2",
    ]  # fmt: skip


def pair_arguments(work_dir: Path) -> list[str | Path]:
    """A run of 8 steps, in two passes, evaluated on held-out pairs after each."""
    return [
        "--model", work_dir / "base", "--max-rows", "32", "--batch-size", "8", "--epochs", "2",
        "--preferences", work_dir / "world/preferences.jsonl",
        "--held-out", work_dir / "world/preferences_validation.jsonl",
    ]  # fmt: skip


def reward_arguments(work_dir: Path, kind: str) -> list[str | Path]:
    return ["training.reward_model", "--kind", kind, *pair_arguments(work_dir)]


@pytest.fixture(scope="session")
def run_once(make_once: MakeOnce) -> Callable[..., Path]:
    """Runs a command once for all workers: (name, *arguments without `--output`) -> its output directory."""

    def output_of(name: str, *arguments: str | Path) -> Path:
        return make_once(name, lambda output: run_command(*arguments, "--output", output))

    return output_of


@pytest.fixture(scope="session")
def sft(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A model that `training.sft` made."""
    return run_once("sft", *sft_arguments(work_dir))


@pytest.fixture(scope="session")
def implicit_reward(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """An implicit reward, evaluated on held-out pairs."""
    return run_once("implicit", *reward_arguments(work_dir, "implicit"))


@pytest.fixture(scope="session")
def scalar_reward(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A scalar reward, evaluated on held-out pairs."""
    return run_once("scalar", *reward_arguments(work_dir, "scalar"))


@pytest.fixture(scope="session")
def dpo(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A model that `training.dpo` made."""
    return run_once("dpo", "training.dpo", *pair_arguments(work_dir))


@pytest.fixture(scope="session")
def rlhf(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A model that `training.rlhf_ppo` made in three updates."""
    return run_once("rlhf", *rlhf_arguments(work_dir))


@pytest.fixture(scope="session")
def self_judged(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A LoRA that `training.self_judge` made in three updates."""
    return run_once(
        "self_judge",
        "training.self_judge", "--model", work_dir / "base", "--prompts", work_dir / "world/prompts.jsonl", "--steps",
        "3",
        "--held-out", work_dir / "world/prompts_validation.jsonl", "--num-held-out", "4", "--pairs", "8",
        "--check-every", "2", "--decoding.max-new-tokens", "8", "--max-flips", "1",
        "--outside", "tests.training.models:length", "--min-agreement", "0",
    )  # fmt: skip


def rlhf_arguments(work_dir: Path) -> list[str | Path]:
    return [
        "training.rlhf_ppo", "--model", work_dir / "base", "--reward", work_dir / "reward-aligned", "--steps", "3",
        "--prompts", work_dir / "world/prompts.jsonl", "--episodes", "8", "--save-every", "1",
        "--decoding.max-new-tokens", "8", "--resume",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def evaluations(work_dir: Path, scalar_reward: Path, make_once: MakeOnce) -> list[Path]:
    """The figures of a proxy on 5 prompts: by the reference scorer, and by two rewards; `blind` has the answers."""
    rewards = ("--reward", work_dir / "reward-aligned", scalar_reward)
    names = ["gold.json", "rewards.json"]

    def evaluate(directory: Path) -> None:
        for name, extra in zip(names, [("--blind", directory / "blind"), rewards], strict=True):
            run_command(
                "training.evaluate", "--model", work_dir / "base", "--proxy", work_dir / "proxy-aligned", "--output",
                directory / name,
                "--prompts", work_dir / "world/prompts_validation.jsonl", "--num-prompts", "5", *extra,
            )  # fmt: skip

    directory = make_once("evaluations", evaluate)
    return [directory / name for name in names]


@pytest.fixture(scope="session")
def direct_proxy(work_dir: Path, run_once: Callable[..., Path]) -> Path:
    """A proxy that `training.proxy_dpo` made."""
    return run_once(
        "direct",
        "training.proxy_dpo", "--model", work_dir / "base", "--max-rows", "40",
        "--preferences", work_dir / "world/preferences.jsonl",
        "--held-out", work_dir / "world/preferences_validation.jsonl",
    )  # fmt: skip
