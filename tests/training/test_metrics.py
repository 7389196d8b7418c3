"""docs/metrics.md names what the commands log: nothing more, nothing less. And the files that a run leaves."""

import json
import re
from pathlib import Path

import pytest

from training.metrics import CURVES_FILE, read_metrics
from training.trackers import EVENTS_DIRECTORY

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
COMMAND = re.compile(r"`(training\.\w+(?: --kind \w+)?)`")


def documented() -> dict[str, set[str]]:
    """Command -> the names in the tables under the headings that name it."""
    names: dict[str, set[str]] = {}
    commands: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            commands = COMMAND.findall(line)
        elif line.startswith("| `"):
            cell = line.replace(r"\|", "").split("|")[1]
            for command in commands:
                names.setdefault(command, set()).update(re.findall(r"`([^`]+)`", cell))
    return names


@pytest.fixture(scope="module")
def runs(
    work_dir: Path,
    sft: Path,
    implicit_reward: Path,
    scalar_reward: Path,
    dpo: Path,
    rlhf: Path,
    self_judged: Path,
    direct_proxy: Path,
) -> dict[str, Path]:
    """Command -> the directory that a tiny run of it wrote."""
    return {
        "training.sft": sft,
        "training.jsft": work_dir / "base",
        "training.reward_model --kind implicit": implicit_reward,
        "training.reward_model --kind scalar": scalar_reward,
        "training.dpo": dpo,
        "training.rlhf_ppo": rlhf,
        "training.self_judge": self_judged,
        "training.proxy_dpo": direct_proxy,
        "training.proxy_ppo": work_dir / "proxy-aligned",
    }


def names_of(figures: dict[str, object]) -> set[str]:
    return {*figures} - {"step"}


def test_every_metric_is_documented_and_every_documented_one_is_logged(
    runs: dict[str, Path], evaluations: list[Path]
) -> None:
    logged = {
        command: set().union(*map(names_of, read_metrics(directory)))
        for command, directory in runs.items()
    }
    figures = [json.loads(path.read_text()) for path in evaluations]
    by_reward = [
        scores for evaluation in figures for scores in evaluation.get("rewards", {}).values()
    ]
    logged["training.evaluate"] = set().union(*map(names_of, [*figures, *by_reward]))
    assert documented() == logged


def test_every_run_leaves_finite_rows_events_and_curves(runs: dict[str, Path]) -> None:
    for directory in runs.values():
        rows = read_metrics(directory)
        assert rows[0]["step"] == 1
        # NaN is the value that differs from itself.
        assert all(value == value for row in rows for value in row.values())
        assert (directory / CURVES_FILE).stat().st_size > 20_000
        assert list((directory / EVENTS_DIRECTORY).iterdir())
