"""A killed save leaves no partial model that can be loaded."""

import signal
import time
from pathlib import Path

import pytest

from tests.warm import Command
from training.saving import saving

FILES = ("model.safetensors", "tokenizer.json", "config.json", "reward.json")


def test_a_save_killed_at_any_moment_leaves_a_whole_model_or_none(tmp_path: Path) -> None:
    num_whole = 0
    for milliseconds in range(12):
        process = Command("tests.training.saves", tmp_path)
        while not (tmp_path / "reward.json").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "config.json").exists():
            size = (tmp_path / "model.safetensors").stat().st_size
            letters = {(tmp_path / name).read_text()[:1] for name in FILES[:-1]}
            assert size == 1_000_000 and len(letters) == 1
        if (tmp_path / "reward.json").exists():  # the last: all are there
            assert all((tmp_path / name).exists() for name in FILES)
            num_whole += 1
        (tmp_path / "reward.json").unlink(missing_ok=True)
    assert num_whole


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("before")
    with pytest.raises(OSError, match="disk full"), saving(tmp_path) as directory:
        (directory / "config.json").write_text("after")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "before"


def test_an_earlier_models_weights_go(tmp_path: Path) -> None:
    other_files = ("metrics.jsonl", "training_state.safetensors")
    old_files = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "reward.json")
    for name in (*other_files, *old_files):
        (tmp_path / name).write_text("old")
    with saving(tmp_path) as directory:
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_text("new")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*other_files, "config.json", "model.safetensors"}
