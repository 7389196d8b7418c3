"""Start-up time and memory of serving with proxies: `python -m benchmarks.startup`.

Start-up: seconds from a server's start to its first healthy answer, for Assent with one proxy and vLLM's own server
alternately. Memory: growth of an engine's process with every proxy that it loads, and the sizes that `list_proxies`
reports.
"""

import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines import ServerKind, make_llm, serve
from benchmarks.figures import write_figures
from benchmarks.models import Model, ModelName, get_model, make_proxy
from judge.options import read_options


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: ModelName = "demo"
    """demo or large."""
    pairs: int = 3
    """Starts of each server; 0 = measure memory only."""
    proxies: int = 8
    """Proxies loaded one after another to measure memory; 0 = measure starts only."""
    output: Path | None = None
    """A JSON file for the metrics."""


def start_up(model: Model, pairs: int) -> dict[ServerKind, list[float]]:
    """Seconds of every start."""
    seconds: dict[ServerKind, list[float]] = {"stock": [], "assent": []}
    for number in range(pairs):
        for kind in list(seconds) if number % 2 == 0 else reversed(seconds):
            proxies = {"proxy": model.proxy} if kind == "assent" else {}
            with serve(model, kind, proxies) as server:
                seconds[kind].append(server.seconds_to_start)
    return seconds


def memory(model: Model, count: int) -> dict[str, Any]:
    """Resident bytes of the process before, and after each of `count` different proxies."""
    llm = make_llm(model)
    held = [resident_bytes()]
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            directory = Path(scratch) / str(number)
            make_proxy(directory, model.directory, seed=number, **like(model))
            llm.collective_rpc("load_proxy", args=(f"proxy{number}", str(directory)))
            held.append(resident_bytes())
    return {
        "resident_bytes": held,
        "num_bytes": [proxy["num_bytes"] for proxy in llm.collective_rpc("list_proxies")[0]],
    }


def like(model: Model) -> dict[str, Any]:
    """The settings of the model's own proxy that determine its size."""
    config = json.loads((model.proxy / "config.json").read_text(encoding="utf-8"))["network"]
    return {key: config[key] for key in ("width", "max_candidates")}


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("every process has a VmRSS")


def show(figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title=f"{figures['model']} model")
    for kind, seconds in figures["seconds_to_start"].items():
        if seconds:
            listing = ", ".join(f"{value:.1f}" for value in seconds)
            table.add_row(f"start of {kind}, median", f"{median(seconds):.1f} s ({listing})")
    if held := figures["resident_bytes"]:
        grown = [b - a for a, b in pairwise(held)]
        table.add_row("process before the first proxy", f"{held[0] / 2**20:.0f} MiB")
        table.add_row(
            "growth with each", ", ".join(f"{value / 2**20:.1f}" for value in grown) + " MiB"
        )
        mean = (held[-1] - held[0]) / len(grown)
        table.add_row("mean growth", f"{mean / 2**20:.1f} MiB")
        table.add_row("by list_proxies, each", f"{figures['num_bytes'][0] / 2**20:.1f} MiB")
    Console(width=120).print(table)


def main(options: Options) -> None:
    model = get_model(options.model)
    figures: dict[str, Any] = {
        "model": model.name,
        "seconds_to_start": start_up(model, options.pairs),
        "resident_bytes": [],
        "num_bytes": [],
    }
    if options.proxies:
        figures |= memory(model, options.proxies)
    show(figures)
    write_figures(options.output, figures)


if __name__ == "__main__":
    main(read_options(Options, __doc__))
