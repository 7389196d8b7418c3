"""Runs of transformers' and trl's trainers that were killed go on, to the weights of an unbroken run."""

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


def check(arguments: list[str | Path], unbroken: Path, output: Path, saved: int) -> None:
    """Kill the run when a checkpoint of at least `saved` steps is there, in the second pass; go on; compare."""
    command = [*map(str, arguments), "--output", str(output), "--save-every", "1", "--resume"]
    process = Command(*command)
    while max(steps_saved(output), default=0) < saved:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "config.json").exists()
    cut_short = output / "checkpoints" / "checkpoint-999"
    cut_short.mkdir()
    (cut_short / "trainer_state.json").write_text('{"global_step": 99')
    resumed = run(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    ours, theirs = (load_file(x / "model.safetensors") for x in (output, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [[row["step"] for row in read_metrics(x)] for x in (output, unbroken)]
    assert steps[0] == steps[1]
    assert (output / CURVES_FILE).exists()
    assert not (output / "checkpoints").exists()


def steps_saved(output: Path) -> list[int]:
    found = output.glob("checkpoints/checkpoint-*/trainer_state.json")
    return [int(path.parent.name.split("-")[1]) for path in found]


def test_sft(work: Path, sft: Path, tmp_path: Path) -> None:
    check(sft_arguments(work), sft, tmp_path, saved=13)


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
    work: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    unbroken = request.getfixturevalue(f"{kind}_reward")
    check(reward_arguments(work, kind), unbroken, tmp_path, saved=5)
