"""Speculative decoding with n-gram drafts: `python -m benchmarks.drafts --model smollm2`.

Two engines in this process, one of which drafts, serve the same requests in turns, without and with a proxy. In the
workload "copy" an answer repeats a text of the prompt, where n-grams draft well; in "chat" they seldom do. Times are
CPU seconds of the engine's single thread, which never waits: they vary less than wall time on a shared machine. A ratio
is that of two engines in one round: median and quartiles.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from benchmarks.engines import make_llm
from benchmarks.figures import write_figures
from benchmarks.models import ModelName, get_model
from judge.options import read_options
from proxy.request import WorkerAlignment

Workload = Literal["copy", "chat"]

SUBJECTS = ("kettle", "rose", "piano", "cat", "tent", "bike", "lamp", "sofa", "dog", "violin")
TEXT = (
    "Keep the {0} clean and dry. Look at the {0} once a week, and write down what you see. If the {0} has a fault, "
    "take it to somebody who knows about it, and do not try to mend it alone."
)
MESSAGES: dict[Workload, str] = {
    "copy": "Repeat the following text word for word.\n\n" + TEXT,
    "chat": "How do I look after my {0}?",
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: ModelName = "demo"
    """The LLM and its proxy."""
    workloads: tuple[Workload, ...] = ("copy", "chat")
    """Kinds of requests."""
    requests: tuple[int, ...] = (1, 8)
    """Requests at once."""
    temperature: float = 0.3
    """Of all requests."""
    tokens: int = 64
    """Of each answer, which does not end before."""
    drafts: int = 4
    """Tokens drafted at once."""
    rounds: int = 7
    """Of each case, after one to warm up; each has other requests."""
    output: Path | None = None
    """A JSON file for the figures."""


def run(
    llm: Any, workload: Workload, requests: range, *, options: Options, aligned: bool
) -> list[Any]:
    """The answers of one batch; the numbers of the requests are their seeds."""
    from vllm import SamplingParams

    extra_args = WorkerAlignment(proxy="proxy").to_extra_args() if aligned else None
    params = [
        SamplingParams(
            temperature=options.temperature,
            top_p=0.95,
            seed=seed,
            max_tokens=options.tokens,
            ignore_eos=True,
            extra_args=extra_args,
        )
        for seed in requests
    ]
    messages: list[Any] = [
        [{"role": "user", "content": MESSAGES[workload].format(SUBJECTS[i % len(SUBJECTS)])}]
        for i in requests
    ]
    outputs: list[Any] = llm.chat(messages, params, use_tqdm=False)
    return outputs


def count_steps(llm: Any) -> list[int]:
    """A list that grows by one with each pass of the LLM."""
    steps: list[int] = []
    core = llm.llm_engine.engine_core.engine_core
    original = core.model_executor.driver_worker.worker.execute_model

    def execute_model(scheduler_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            steps.append(1)
        return original(scheduler_output)

    core.model_executor.driver_worker.worker.execute_model = execute_model
    return steps


def measure(llms: dict[bool, Any], options: Options) -> list[dict[str, Any]]:
    """A row for each workload and number of requests, without and with a proxy."""
    steps = {drafts: count_steps(llm) for drafts, llm in llms.items()}
    rows = []
    for workload, count, aligned in product(options.workloads, options.requests, (False, True)):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        passes = {False: 0, True: 0}
        texts: dict[bool, list[str]] = {}
        num_same = 0
        for number in range(options.rounds + 1):
            requests = range(number * count, (number + 1) * count)
            for drafts, llm in llms.items():
                steps[drafts].clear()
                start = time.process_time()
                outputs = run(llm, workload, requests, options=options, aligned=aligned)
                seconds[drafts].append(time.process_time() - start)
                passes[drafts] += len(steps[drafts])
                texts[drafts] = [output.outputs[0].text for output in outputs]
            num_same += sum(a == b for a, b in zip(*texts.values(), strict=True))
        ratios = [a / b for a, b in zip(seconds[False][1:], seconds[True][1:], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "workload": workload,
                "requests": count,
                "proxy": aligned,
                "without": statistics.median(seconds[False][1:]),
                "with": statistics.median(seconds[True][1:]),
                "speedup": statistics.median(ratios),
                "quartiles": (low, high),
                "tokens_per_pass": (options.rounds + 1) * options.tokens / passes[True],
                "same_texts": num_same,
            }
        )
        row = rows[-1]
        print(
            f"| {options.model} | {workload} | {count} | {'aligned' if aligned else 'plain'} "
            f"| {row['without']:.2f} | {row['with']:.2f} | {row['speedup']:.2f} "
            f"[{low:.2f}, {high:.2f}] | {row['tokens_per_pass']:.2f} "
            f"| {num_same} of {(options.rounds + 1) * count} |",
            flush=True,
        )
    return rows


def main(options: Options) -> None:
    """Print the table."""
    model = get_model(options.model)
    config = {
        "method": "ngram",
        "num_speculative_tokens": options.drafts,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    llms = {}
    for drafts in (False, True):
        llms[drafts] = make_llm(model, speculative_config=config if drafts else None)
        llms[drafts].collective_rpc("load_proxy", args=("proxy", str(model.proxy)))
    print(
        "| model | workload | requests | sampling | CPU s without drafts | with | speed-up [quartiles] "
        "| tokens a request and pass | same texts |"
    )
    print("|" + " --- |" * 9)
    write_figures(options.output, {"cases": measure(llms, options)})


if __name__ == "__main__":
    main(read_options(Options, __doc__))
