"""Killed runs of transformers' and trl's trainers resume, and end with the weights of an unbroken run."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import reward_arguments, sft_arguments
from tests.warm import Command, run
from training.checkpoints import newest_checkpoint
from training.metrics import CURVES_FILE, read_metrics


def check_resumed_run(
    arguments: list[str | Path], unbroken: Path, output: Path, min_steps: int
) -> None:
    """Kill the run when a checkpoint of at least `saved` steps is there, in the second pass; resume; compare."""
    command = [*map(str, arguments), "--output", str(output), "--save-every", "1", "--resume"]
    process = Command(*command)
    while max(saved_steps(output), default=0) < min_steps:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "config.json").exists()
    damaged = output / "checkpoints" / "checkpoint-999"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text('{"global_step": 99')
    resumed = run(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    resumed_weights, expected_weights = (
        load_file(directory / "model.safetensors") for directory in (output, unbroken)
    )
    assert resumed_weights.keys() == expected_weights.keys()
    assert all(
        torch.equal(resumed_weights[name], expected_weights[name]) for name in resumed_weights
    )
    steps = [[row["step"] for row in read_metrics(directory)] for directory in (output, unbroken)]
    assert steps[0] == steps[1]
    assert (output / CURVES_FILE).exists()
    assert not (output / "checkpoints").exists()


def saved_steps(output: Path) -> list[int]:
    paths = output.glob("checkpoints/checkpoint-*/trainer_state.json")
    return [int(path.parent.name.split("-")[1]) for path in paths]


def test_sft(work_dir: Path, sft: Path, tmp_path: Path) -> None:
    check_resumed_run(sft_arguments(work_dir), sft, tmp_path, min_steps=13)


def test_the_newest_whole_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    directory = tmp_path / "checkpoints"
    for name, state in {"9": "{}", "10": "{}", "11": '{"global_st', "12": None}.items():
        (directory / f"checkpoint-{name}").mkdir(parents=True)
        if state is not None:
            (directory / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == directory / "checkpoint-10"


@pytest.mark.parametrize("kind", ["implicit", pytest.param("scalar", marks=pytest.mark.slow)])
def test_reward_model(
    work_dir: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    unbroken = request.getfixturevalue(f"{kind}_reward")
    check_resumed_run(reward_arguments(work_dir, kind), unbroken, tmp_path, min_steps=5)
