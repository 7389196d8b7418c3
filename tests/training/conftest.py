"""One tiny run of the whole training path for all tests of it."""

import os
from pathlib import Path

import pytest

from tests.server.conftest import free_port
from tests.warm import Command, run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no curves, which would take seconds. test_metrics.py checks those of all commands."""
    monkeypatch.setattr("training.metrics.draw_curves", lambda rows, path: None)


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of `training.demo`, run at 1/200 of its size; `demo/` in it is what it publishes."""
    directory = tmp_path_factory.mktemp("training")
    result = run(
        "training.demo", "--work", directory, "--output", directory / "demo", "--scale", "0.005"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


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
def sft(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.sft` made."""
    output = tmp_path_factory.mktemp("sft")
    run_command(*sft_arguments(work_dir), "--output", output)
    return output


@pytest.fixture(scope="session")
def implicit_reward(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An implicit reward, evaluated on held-out pairs."""
    output = tmp_path_factory.mktemp("implicit")
    run_command(*reward_arguments(work_dir, "implicit"), "--output", output)
    return output


@pytest.fixture(scope="session")
def scalar_reward(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scalar reward, evaluated on held-out pairs."""
    output = tmp_path_factory.mktemp("scalar")
    run_command(*reward_arguments(work_dir, "scalar"), "--output", output)
    return output


@pytest.fixture(scope="session")
def dpo(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.dpo` made."""
    output = tmp_path_factory.mktemp("dpo")
    run_command("training.dpo", *pair_arguments(work_dir), "--output", output)
    return output


@pytest.fixture(scope="session")
def rlhf(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.rlhf_ppo` made in three updates."""
    output = tmp_path_factory.mktemp("rlhf")
    run_command(*rlhf_arguments(work_dir), "--output", output)
    return output


@pytest.fixture(scope="session")
def self_judged(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that `training.self_judge` made in three updates."""
    output = tmp_path_factory.mktemp("self_judge")
    run_command(
        "training.self_judge", "--model", work_dir / "base", "--prompts", work_dir / "world/prompts.jsonl", "--steps",
        "3",
        "--held-out", work_dir / "world/prompts_validation.jsonl", "--num-held-out", "4", "--pairs", "8",
        "--check-every", "2", "--decoding.max-new-tokens", "8", "--max-flips", "1",
        "--outside", "tests.training.models:length", "--min-agreement", "0", "--output", output,
    )  # fmt: skip
    return output


def rlhf_arguments(work_dir: Path) -> list[str | Path]:
    return [
        "training.rlhf_ppo", "--model", work_dir / "base", "--reward", work_dir / "reward-aligned", "--steps", "3",
        "--prompts", work_dir / "world/prompts.jsonl", "--episodes", "8", "--save-every", "1",
        "--decoding.max-new-tokens", "8", "--resume",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def evaluations(
    work_dir: Path, scalar_reward: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The figures of a proxy on 5 prompts: by the reference scorer, and by two rewards."""
    directory = tmp_path_factory.mktemp("evaluations")
    outputs = [directory / "gold.json", directory / "rewards.json"]
    rewards = ("--reward", work_dir / "reward-aligned", scalar_reward)
    for output, extra in zip(outputs, ((), rewards), strict=True):
        run_command(
            "training.evaluate", "--model", work_dir / "base", "--proxy", work_dir / "proxy-aligned", "--output",
            output,
            "--prompts", work_dir / "world/prompts_validation.jsonl", "--num-prompts", "5", *extra,
        )  # fmt: skip
    return outputs


@pytest.fixture(scope="session")
def direct_proxy(work_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proxy that `training.proxy_dpo` made."""
    output = tmp_path_factory.mktemp("direct")
    run_command(
        "training.proxy_dpo", "--model", work_dir / "base", "--max-rows", "40", "--output", output,
        "--preferences", work_dir / "world/preferences.jsonl",
        "--held-out", work_dir / "world/preferences_validation.jsonl",
    )  # fmt: skip
    return output
