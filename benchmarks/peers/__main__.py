"""The tables of docs/results/peers.md: Assent beside its peers, on the toy data and on SmolLM2-135M-Instruct.

    python -m benchmarks.peers

All serving rows share one engine, Assent's server; ARGS, CARDS and GenARM run in transformers. optillm and its_hub are
installed from PyPI into environments of their own; a peer that cannot be installed is left out. Finished jobs are not
repeated: a stopped run continues where it was. `--scale 0.02` runs the path in minutes, with meaningless results;
`--rows` runs some rows of the tables.

Requests of Assent's rows and of the methods in transformers have seeds. optillm and its_hub pass none on: their answers
differ from run to run.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.comparison.jobs import Job, run_job
from benchmarks.models import DEMO
from benchmarks.peers import environments, report
from benchmarks.peers.engine import Engine, open_engine
from benchmarks.peers.plan import GetEngine, decoding_jobs, is_finished, serving_jobs
from benchmarks.peers.setting import Options, PeerName, Setting, WorldName, scaled
from benchmarks.peers.trained_judge import judge_of
from deploy.demo.smollm2.convert import model_directory
from training.console import main_guard, read_options


def main(options: Options) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the servers too
    prepared = prepare(options)
    settings = [setting_of(options, world, prepared) for world in options.worlds]
    for setting in settings if not options.report_only else ():
        with engine_on_demand(setting) as engine:
            run(setting, serving_jobs(setting, engine))
        run(setting, decoding_jobs(setting))
    report.write(settings, prepared, options.output)


def prepare(options: Options) -> dict[PeerName, dict[str, Any]]:
    """The environments of the peers that can be had: where, size, and seconds if they were made here."""
    prepared: dict[PeerName, dict[str, Any]] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.peers:
        given: Path | None = getattr(options, name)
        place = given or options.work / "environments" / name
        found = environments.find(name, place)
        if found is None and given is None and not options.report_only:
            log = options.work / f"{name}.log"
            print(f"{name}: installing into {place}", flush=True)
            try:
                found = environments.make(name, place, log)
            except subprocess.CalledProcessError:
                print(f"{name}: pip failed, see {log}: its rows are left out", file=sys.stderr)
                continue
        if found is None:
            print(f"{name}: not in {place}: its rows are left out", file=sys.stderr)
            continue
        prepared[name] = found | {"place": str(place)}
    return prepared


def setting_of(
    options: Options, world: WorldName, prepared: dict[PeerName, dict[str, Any]]
) -> Setting:
    is_toy = world == "toy"
    num_prompts = scaled(options.prompts[not is_toy], options.scale, 4)
    num_costly = scaled(options.costly, options.scale, 4)
    return Setting(
        model=DEMO / "model" if is_toy else model_directory(),
        work=options.work / world,
        scale=options.scale,
        world=world,
        num_prompts=num_prompts,
        num_costly=num_prompts if is_toy else min(num_prompts, num_costly),
        rounds=scaled(options.rounds, options.scale, 1),
        clients=options.clients,
        num_pairs=scaled(4_000 if is_toy else 500, options.scale, 64),
        rows=options.rows,
        environments={name: Path(found["place"]) for name, found in prepared.items()},
    )


def run(setting: Setting, jobs: list[Job]) -> None:
    """All unfinished jobs, one after the other: they are timed."""
    for job in jobs:
        if not is_finished(setting, job):
            print(f"{setting.world}: {job.name}", flush=True)
            run_job(setting, job)


@contextmanager
def engine_on_demand(setting: Setting) -> Iterator[GetEngine]:
    """The engine, started when it is first asked for."""
    with ExitStack() as stack:
        opened: list[Engine] = []

        def get() -> Engine:
            if not opened:
                opened.append(stack.enter_context(open_engine(setting, judge_of(setting))))
            return opened[0]

        yield get


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
