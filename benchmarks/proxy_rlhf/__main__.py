"""The table of docs/results/proxy_rlhf.md: `python -m benchmarks.proxy_rlhf`.

All methods side by side on the bundled world, three training seeds each. What is done stays done: a run that was
stopped goes on where it was. `--scale 0.01` shows the path in minutes, with results that mean nothing.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.models import DEMO
from benchmarks.proxy_rlhf import report
from benchmarks.proxy_rlhf.jobs import Setting, run_job
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


def setting_of(options: Options) -> Setting:
    def some(count: int, least: int = 1) -> int:
        return max(least, int(count * options.scale))

    return Setting(
        model=options.model,
        work=options.work,
        num_test=some(1000, 8),
        num_divergence=some(300, 8),
        num_pairs=some(12_000, 32),
        episodes=some(256, 16),
        scale=options.scale,
    )


def run_all(options: Options, setting: Setting) -> None:
    """Every job that is not done yet, as soon as what it needs is, each in a process of its own."""
    jobs = all_jobs(options.seeds)
    done = {job.name for job in jobs if (setting.directory(job.name) / "result.json").exists()}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        with tqdm(total=len(jobs), initial=len(done), unit="job") as bar:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for job in ready[: options.processes - len(running)]:
                    waiting.remove(job)
                    running[job.name] = begin(options, job.name)
                time.sleep(0.2)
                for name in [
                    name for name, process in running.items() if process.poll() is not None
                ]:
                    if running.pop(name).returncode:
                        raise SystemExit(f"{name} failed: see {log_of(options, name)}")
                    done.add(name)
                    bar.update()
                    tqdm.write(f"{time.strftime('%H:%M:%S')} {name}")
    finally:
        for process in running.values():
            process.terminate()


def begin(options: Options, name: str) -> subprocess.Popen[bytes]:
    """This command again, with `--job`."""
    log = log_of(options, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.proxy_rlhf", *sys.argv[1:], "--job", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def log_of(options: Options, name: str) -> Path:
    return (options.work / name).with_suffix(".log")


def main(options: Options) -> None:
    setting = setting_of(options)
    if options.job is not None:
        (job,) = [job for job in all_jobs(options.seeds) if job.name == options.job]
        return run_job(setting, job)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the jobs too
    run_all(options, setting)
    report.write(setting, options.seeds, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
