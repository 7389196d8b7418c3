"""The time of a decode step by part, with and without a proxy: `python -m benchmarks.steps --model demo`.

The engine runs in this process, so its parts can be timed one by one. The time of a part excludes that of the parts
inside it. Times are CPU seconds of the engine's single thread, which never waits: they vary less than wall time on a
shared machine. Unproxied ("plain") and proxied ("aligned") rounds alternate; the table has the medians of the rounds,
in milliseconds a step. The overhead of the timers, some microseconds a step, counts in the enclosing part.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig

import proxy.engine.sampler_v1
from benchmarks.clock import SAMPLING_PARTS, Clock, timed_sampling
from benchmarks.engines import make_llm
from benchmarks.figures import write_figures
from benchmarks.models import Model, ModelName, get_model
from benchmarks.throughput import SAMPLINGS, SamplingName
from judge.options import read_options
from proxy.request import WorkerAlignment

PROMPT_TOKENS = 8
WARM_STEPS = 3  # including the prefill
PARTS = (
    "scheduler",
    "inputs",
    "forward",
    "head",
    "plan",
    "constraints",
    "draw",
    *SAMPLING_PARTS,
    "bookkeeping",
    "rest",
)
"""In the order in which they run.

scheduler: scheduling and bookkeeping of requests. inputs: the tensors of the batch. forward: the LLM. head: hidden
states to logits. plan: which row uses which proxy. constraints: float32 logits, penalties, bans and similar. draw:
everything that the sampler does with the constrained logits, except the parts of accept/reject sampling
(`benchmarks/clock.py`). bookkeeping: the runner's, after sampling. rest: output texts and similar.
"""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: ModelName = "demo"
    """demo or large; one engine a process."""
    requests: tuple[int, ...] = (1, 64)
    """Rows of the batch."""
    samplings: tuple[SamplingName, ...] = ("top_p 1", "top_p 0.95", "top_k 20, top_p 0.95")
    """Sampling parameters; the temperature is 1 unless stated."""
    rounds: int = 7
    """Rounds with and without proxy."""
    steps: int = 30
    """Decode steps in a round."""
    output: Path | None = None
    """A JSON file for the metrics."""


def instrument(engine: Any, clock: Clock) -> None:
    """Wrap vLLM's methods and the functions of accept/reject sampling with timers."""
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    runner = worker.model_runner
    clock.wrap(core.scheduler, "schedule", "scheduler")
    clock.wrap(core.scheduler, "update_from_output", "scheduler")
    clock.wrap(worker, "execute_model", "inputs")
    clock.wrap(runner, "_model_forward", "forward")
    clock.wrap(runner.model, "compute_logits", "head")
    clock.wrap(worker, "sample_tokens", "plan")
    clock.wrap(runner, "sample_tokens", "bookkeeping")
    clock.wrap(runner.sampler, "forward", "constraints")
    clock.wrap(runner.sampler, "sample", "draw")
    clock.wrap(proxy.engine.sampler_v1, "sample_proxied_rows", "draw")


def one_round(
    engine: Any, clock: Clock, params: Any, prompts: list[list[int]], steps: int
) -> dict[str, float]:
    """Milliseconds a step, by part, of one decoding batch."""
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{index}", {"prompt_token_ids": prompt}, params)
    for _ in range(WARM_STEPS):
        engine.step()
    clock.take()
    for _ in range(steps):
        with clock.part("rest"):
            engine.step()
    seconds = clock.take()
    while engine.has_unfinished_requests():
        engine.step()
    return {part: seconds[part] * 1e3 / steps for part in PARTS}


def measure_case(
    engine: Any, clock: Clock, options: Options, prompts: list[list[int]], sampling: SamplingName
) -> Iterator[dict[str, Any]]:
    """The rows of the table for one batch, without and with proxy."""
    from vllm import SamplingParams

    def params(extra_args: dict[str, Any] | None) -> Any:
        return SamplingParams(
            max_tokens=options.steps + WARM_STEPS + 2,
            ignore_eos=True,
            extra_args=extra_args,
            **({"temperature": 1.0} | SAMPLINGS[sampling]),
        )

    kinds = {
        "plain": params(None),
        "aligned": params(WorkerAlignment(proxy="proxy").to_extra_args()),
    }
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(options.rounds + 1):
        for kind in list(kinds) if number % 2 == 0 else reversed(kinds):
            figures = one_round(engine, clock, kinds[kind], prompts, options.steps)
            if number > 0:  # the first one warms up
                rounds[kind].append(figures)
    for kind, figures_of in rounds.items():
        yield {
            "requests": len(prompts),
            "sampling": sampling,
            "kind": kind,
            "total_ms": median(sum(figures.values()) for figures in figures_of),
            "parts_ms": {part: median(figures[part] for figures in figures_of) for part in PARTS},
        }


def measure(options: Options, model: Model) -> list[dict[str, Any]]:
    llm = make_llm(model)
    llm.collective_rpc("load_proxy", args=("proxy", str(model.proxy)))
    engine, clock = llm.llm_engine, Clock()
    instrument(engine, clock)
    vocab_size = AutoConfig.from_pretrained(model.directory).vocab_size
    rng = random.Random(0)
    rows = []
    with timed_sampling(clock, "cpu"):
        for count, sampling in product(options.requests, options.samplings):
            prompts = [
                [rng.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)
            ]
            for row in measure_case(engine, clock, options, prompts, sampling):
                rows.append({"model": model.name} | row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the docs: milliseconds a step."""
    head = ["model", "rows", "sampling", "", *PARTS, "step"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["model"], str(row["requests"]), row["sampling"], row["kind"]]
        cells += [f"{row['parts_ms'][part]:.2f}" for part in PARTS]
        lines.append([*cells, f"{row['total_ms']:.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(options: Options) -> None:
    rows = measure(options, get_model(options.model))
    print(markdown(rows))
    write_figures(options.output, rows)


if __name__ == "__main__":
    main(read_options(Options, __doc__))
