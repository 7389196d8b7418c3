"""`--report-to`: TensorBoard's events are among the files of every run (test_metrics.py); here are the others."""

import json
import os
from pathlib import Path

import pytest

from tests.training.models import data_rows, save_model
from tests.warm import Command, run

WANDB = """
import json, os

class _Config:
    def update(self, values, **more):
        _write("config", values)

class _Run:
    def log(self, values, step=None, **more):
        _write("log", {"step": step, **values})

    def finish(self):
        _write("finish", {})

def _write(kind, values):
    with open(os.environ["TESTS_WANDB"], "a") as file:
        file.write(json.dumps([kind, values]) + chr(10))

config = _Config()

def init(**settings):
    _write("init", settings)
    return _Run()
"""
"""Records the calls that accelerate's tracker makes of the real one."""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    directory = tmp_path_factory.mktemp("data")
    save_model("llama", directory / "model")
    rows = "".join(json.dumps(row) + "\n" for row in data_rows("preferences"))
    (directory / "preferences.jsonl").write_text(rows)
    return [
        "training.proxy_dpo", "--model", directory / "model", "--epochs", "2",
        "--preferences", directory / "preferences.jsonl",
    ]  # fmt: skip


def test_a_tracker_gets_the_options_and_every_row(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(WANDB)
    record, output = tmp_path / "record.jsonl", tmp_path / "mine"
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TESTS_WANDB": str(record)}
    environment.pop("WANDB_PROJECT", None)
    command = Command(*arguments, "--output", output, "--report-to", "wandb", environment=environment)  # fmt: skip
    outputs = command.communicate()
    assert command.wait() == 0, outputs
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert calls[0] == ["init", {"project": "assent", "name": "mine"}]
    assert calls[1][0] == "config" and calls[1][1]["decoding.top_k"] == 16
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [call[1] for call in calls if call[0] == "log"] == rows
    assert calls[-1][0] == "finish"
    assert not (output / "tensorboard").exists()


def test_one_that_is_not_installed_is_refused_before_anything(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    trackers = ("tensorboard", "trackio", "mlflow")
    result = run(*arguments, "--output", tmp_path / "out", "--report-to", *trackers)
    assert result.returncode == 2
    line = "error: --report-to trackio mlflow: not installed: pip install trackio mlflow"
    assert result.stderr.strip() == line
    assert not (tmp_path / "out").exists()
