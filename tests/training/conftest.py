"""One tiny run of the whole training path for all tests of it."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A training command as a user runs it."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of `training.demo`, run at 1/200 of its size; `demo/` in it is what it publishes."""
    directory = tmp_path_factory.mktemp("training")
    result = run(
        "training.demo", "--work", directory, "--output", directory / "demo", "--scale", "0.005"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory
