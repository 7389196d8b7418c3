"""The table of docs/results/proxy_rlhf.md: `python -m benchmarks.proxy_rlhf`.

All methods side by side on the bundled world, three training seeds each. What is done stays done: a run that was
stopped goes on where it was. `--scale 0.01` shows the path in minutes, with results that mean nothing.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.jobs import run_all, run_job, setting_of
from benchmarks.models import DEMO
from benchmarks.proxy_rlhf import report
from benchmarks.proxy_rlhf.plan import all_jobs


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path = DEMO / "model"
    """The frozen LLM."""
    work: Path = Path("runs/benchmarks/proxy_rlhf")
    """Directory of what the jobs leave."""
    output: Path = Path("docs/results")
    """Directory of the table, the plots and the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    processes: int = 2
    """Jobs at once, each on one core."""
    scale: float = 1.0
    """Share of the data, the prompts and the updates."""
    job: str | None = None
    """Only this job, in this process."""


def main(options: Options) -> None:
    setting = setting_of(options.model, options.work, options.scale)
    jobs = all_jobs(options.seeds)
    if options.job is not None:
        return run_job(setting, next(job for job in jobs if job.name == options.job))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the jobs too
    run_all(setting, jobs, "benchmarks.proxy_rlhf", options.processes)
    report.write(setting, options.seeds, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
