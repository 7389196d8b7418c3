"""One tiny run of the whole training path for all tests of it."""

import os
from pathlib import Path

import pytest

from tests.server.conftest import free_port
from tests.warm import Command, run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw nothing, which would take seconds; test_metrics.py looks at what all commands draw."""
    monkeypatch.setattr("training.metrics.draw_curves", lambda rows, path: None)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of `training.demo`, run at 1/200 of its size; `demo/` in it is what it publishes."""
    directory = tmp_path_factory.mktemp("training")
    result = run(
        "training.demo", "--work", directory, "--output", directory / "demo", "--scale", "0.005"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def done(*arguments: str | Path) -> None:
    """Run a training command that must succeed."""
    result = run(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def done_by_two(*arguments: str | Path) -> None:
    """The same in two processes, which learn of each other as from `torchrun`."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    commands = [
        Command(
            *arguments,
            environment=os.environ | place | sizes | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    outputs = [command.communicate() for command in commands]
    assert [command.wait() for command in commands] == [0, 0], outputs


def sft_arguments(work: Path) -> list[str | Path]:
    """A run of 20 steps, in two passes."""
    return [
        "training.sft", "--model", work / "untrained", "--sft", work / "world/sft.jsonl", "--batch-size", "32",
        "--epochs", "2",
    ]  # fmt: skip


def pair_arguments(work: Path) -> list[str | Path]:
    """A run of 8 steps, in two passes, with a look at held-out pairs after each."""
    return [
        "--model", work / "base", "--max-rows", "32", "--batch-size", "8", "--epochs", "2",
        "--preferences", work / "world/preferences.jsonl",
        "--held-out", work / "world/preferences_validation.jsonl",
    ]  # fmt: skip


def reward_arguments(work: Path, kind: str) -> list[str | Path]:
    return ["training.reward_model", "--kind", kind, *pair_arguments(work)]


@pytest.fixture(scope="session")
def sft(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.sft` made."""
    output = tmp_path_factory.mktemp("sft")
    done(*sft_arguments(work), "--output", output)
    return output


@pytest.fixture(scope="session")
def implicit_reward(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An implicit reward, tried on held-out pairs."""
    output = tmp_path_factory.mktemp("implicit")
    done(*reward_arguments(work, "implicit"), "--output", output)
    return output


@pytest.fixture(scope="session")
def scalar_reward(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scalar reward, tried on held-out pairs."""
    output = tmp_path_factory.mktemp("scalar")
    done(*reward_arguments(work, "scalar"), "--output", output)
    return output


@pytest.fixture(scope="session")
def dpo(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.dpo` made."""
    output = tmp_path_factory.mktemp("dpo")
    done("training.dpo", *pair_arguments(work), "--output", output)
    return output


@pytest.fixture(scope="session")
def rlhf(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that `training.rlhf_ppo` made in three updates."""
    output = tmp_path_factory.mktemp("rlhf")
    done(*rlhf_arguments(work), "--output", output)
    return output


@pytest.fixture(scope="session")
def self_judged(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that `training.self_judge` made in three updates."""
    output = tmp_path_factory.mktemp("self_judge")
    done(
        "training.self_judge", "--model", work / "base", "--prompts", work / "world/prompts.jsonl", "--steps", "3",
        "--held-out", work / "world/prompts_validation.jsonl", "--num-held-out", "4", "--pairs", "8",
        "--check-every", "2", "--decoding.max-new-tokens", "8", "--max-flips", "1",
        "--outside", "tests.training.models:length", "--min-agreement", "0", "--output", output,
    )  # fmt: skip
    return output


def rlhf_arguments(work: Path) -> list[str | Path]:
    return [
        "training.rlhf_ppo", "--model", work / "base", "--reward", work / "reward-aligned", "--steps", "3",
        "--prompts", work / "world/prompts.jsonl", "--episodes", "8", "--save-every", "1",
        "--decoding.max-new-tokens", "8", "--resume",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def evaluations(
    work: Path, scalar_reward: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The figures of a proxy on 5 prompts: by the reference scorer, and by two rewards."""
    directory = tmp_path_factory.mktemp("evaluations")
    outputs = [directory / "gold.json", directory / "rewards.json"]
    rewards = ("--reward", work / "reward-aligned", scalar_reward)
    for output, more in zip(outputs, ((), rewards), strict=True):
        done(
            "training.evaluate", "--model", work / "base", "--proxy", work / "proxy-aligned", "--output", output,
            "--prompts", work / "world/prompts_validation.jsonl", "--num-prompts", "5", *more,
        )  # fmt: skip
    return outputs


@pytest.fixture(scope="session")
def direct(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proxy that `training.proxy_dpo` made."""
    output = tmp_path_factory.mktemp("direct")
    done(
        "training.proxy_dpo", "--model", work / "base", "--max-rows", "40", "--output", output,
        "--preferences", work / "world/preferences.jsonl",
        "--held-out", work / "world/preferences_validation.jsonl",
    )  # fmt: skip
    return output
