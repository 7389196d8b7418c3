"""A job of the comparison: a process of its own, on one thread, that leaves its `result.json` when it is done.

One that was killed is run again from its start.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Where the jobs read and write, and how much they do."""

    model: Path
    work: Path
    num_test: int
    num_divergence: int
    num_pairs: int
    episodes: int
    scale: float

    def updates(self, count: int) -> int:
        """So many updates, or the share of them that is asked for."""
        return max(2, int(count * self.scale))

    def directory(self, job: str) -> Path:
        return self.work / job

    def data(self, name: str) -> str:
        return str(self.work / "world" / f"{name}.jsonl")

    def result(self, job: str) -> dict[str, Any]:
        return json.loads((self.directory(job) / "result.json").read_text())


@dataclass(frozen=True)
class Job:
    """`run(setting, directory)` returns what goes into `result.json`."""

    name: str
    run: Callable[[Setting, Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


def run_job(setting: Setting, job: Job) -> None:
    """Run it, measure what it took, and write its result."""
    torch.set_num_threads(1)
    directory = setting.directory(job.name)
    directory.mkdir(parents=True, exist_ok=True)
    result = job.run(setting, directory)
    temporary = directory / ".result.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(directory / "result.json")


@contextmanager
def timed(result: dict[str, Any]) -> Iterator[None]:
    """Adds the seconds that it took, of the clock and of the CPU."""
    cpu, wall = time.process_time(), time.monotonic()
    yield
    result["train_cpu_seconds"] = time.process_time() - cpu
    result["train_wall_seconds"] = time.monotonic() - wall
