"""A comparison as jobs: each runs in its own process, on one thread, and writes `result.json` when it is finished.

Finished jobs are not repeated: a stopped comparison continues where it was, and a killed job starts again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.models import DEMO
from judge.options import read_options


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """The LLM, the directory of the jobs, and the scale of a comparison on any data."""

    model: Path
    work: Path
    scale: float

    def updates(self, count: int) -> int:
        """This number of updates, scaled."""
        return max(2, int(count * self.scale))

    def directory(self, job: str) -> Path:
        return self.work / job

    def result(self, job: str) -> dict[str, Any]:
        return json.loads((self.directory(job) / "result.json").read_text())


@dataclass(frozen=True, kw_only=True)
class Setting(Workplace):
    """Directories and sizes of a comparison on the toy data."""

    num_test: int
    num_divergence: int
    num_pairs: int
    episodes: int

    def data(self, name: str) -> str:
        return str(self.work / "world" / f"{name}.jsonl")


def setting_of(model: Path, work: Path, scale: float) -> Setting:
    """The sizes of a comparison; a small scale runs the whole path in minutes."""

    def scaled(count: int, least: int) -> int:
        return max(least, int(count * scale))

    return Setting(
        model=model,
        work=work,
        num_test=scaled(1000, 8),
        num_divergence=scaled(300, 8),
        num_pairs=scaled(12_000, 32),
        episodes=scaled(256, 16),
        scale=scale,
    )


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path = DEMO / "model"
    """The frozen LLM."""
    work: Path = Path("runs/benchmarks/comparison")
    """Directory for the files of the jobs."""
    output: Path = Path("docs/results")
    """Directory for tables, plots and metrics."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    processes: int = 2
    """Concurrent jobs, each on one core."""
    scale: float = 1.0
    """Share of data, prompts and updates."""
    job: str | None = None
    """Run only this job, in this process."""


@dataclass(frozen=True)
class Job:
    """`run(setting, directory)` returns the content of `result.json`; the setting is the comparison's own."""

    name: str
    run: Callable[[Any, Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


def command(
    description: str,
    module: str,
    plan: Callable[[tuple[int, ...]], list[Job]],
    report: Callable[[Setting, tuple[int, ...], Path], None],
) -> None:
    """The command line of a comparison: runs all jobs, then writes the report."""
    options = read_options(Options, description)
    setting = setting_of(options.model, options.work, options.scale)
    if run(options, setting, plan(options.seeds), module):
        report(setting, options.seeds, options.output)


def run(options: Options, setting: Workplace, jobs: list[Job], module: str) -> bool:
    """Run the job that the options name, or all of them; whether it was all, so that a report can be written."""
    if options.job is not None:
        run_job(setting, next(job for job in jobs if job.name == options.job))
        return False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the jobs too
    run_all(setting, jobs, module, options.processes)
    return True


def run_job(setting: Workplace, job: Job) -> None:
    """Run a job and write its result, with the CPU seconds of all of it, replacing files of an earlier attempt."""
    torch.set_num_threads(1)
    start = time.process_time()
    directory = setting.directory(job.name)
    directory.mkdir(parents=True, exist_ok=True)
    result = job.run(setting, directory)
    result = result | {"job_cpu_seconds": time.process_time() - start}
    temporary = directory / ".result.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(directory / "result.json")


@contextmanager
def timed(result: dict[str, Any]) -> Iterator[None]:
    """Measure wall and CPU seconds of the block."""
    cpu, wall = time.process_time(), time.monotonic()
    yield
    result["train_cpu_seconds"] = time.process_time() - cpu
    result["train_wall_seconds"] = time.monotonic() - wall


def run_all(setting: Workplace, jobs: list[Job], module: str, processes: int) -> None:
    """Run every unfinished job as soon as the jobs that it needs are finished, each in its own process.

    Raises:
        SystemExit: a job failed; the message names it and its log.
    """
    done = {job.name for job in jobs if (setting.directory(job.name) / "result.json").exists()}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        with tqdm(total=len(jobs), initial=len(done), unit="job") as bar:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for job in ready[: processes - len(running)]:
                    waiting.remove(job)
                    running[job.name] = _begin(setting, module, job.name)
                time.sleep(0.2)
                ended = [name for name, process in running.items() if process.poll() is not None]
                for name in ended:
                    if running.pop(name).returncode:
                        raise SystemExit(f"{name} failed: see {log_of(setting, name)}")
                    done.add(name)
                    bar.update()
                    tqdm.write(f"{time.strftime('%H:%M:%S')} {name}")
    finally:
        for process in running.values():
            process.terminate()


def _begin(setting: Workplace, module: str, name: str) -> subprocess.Popen[bytes]:
    """Start the comparison's command with `--job`."""
    log = log_of(setting, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *sys.argv[1:], "--job", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def log_of(setting: Workplace, name: str) -> Path:
    return (setting.work / name).with_suffix(".log")
