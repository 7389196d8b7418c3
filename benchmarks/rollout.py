"""A training rollout with vLLM compared with transformers: `python -m benchmarks.rollout`.

The two alternate in one process, with the same prompts, seeds and proxy; the order changes from round to round.
Everything that training has to do is included: with vLLM publishing the proxy and reading the traces, with transformers
projecting the embeddings. Starting the engine is not.

On a CPU there is one thread, and times are its CPU seconds: they vary less than wall time on a shared machine.
"""

import random
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.clock import Clock
from benchmarks.figures import write_figures
from benchmarks.models import Model, ModelName, get_model
from benchmarks.throughput import compare
from benchmarks.toy_prompts import held_out_prompts
from judge.options import read_options
from proxy.checkpoint import identify, load
from training.conversations import Conversations
from training.models import end_ids
from training.policy import Decoding, Policy
from training.rollout import Rollout, generate
from training.rollout_vllm import VLLMBackend

PROMPT_TOKENS = 24  # where the prompts are random words


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: ModelName = "demo"
    """The demo's frozen LLM with its proxy, or half a billion random parameters, which hardly ever end a response."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the LLM."""
    episodes: int = 256
    """Responses in a rollout."""
    max_requests: int = 256
    """Concurrent requests in vLLM."""
    decoding: Decoding = field(default_factory=Decoding)
    """How responses are sampled."""
    rounds: int = 11
    """Rollouts of each kind, after a warm-up."""
    memory: float = 0.3
    """`--rollout-memory` of training."""
    output: Path | None = None
    """A JSON file for the metrics."""


def make_prompts(model: Model, tokenizer: Any, number: int) -> list[list[int]]:
    """Prompts of the toy data for the demo, else random words."""
    if model.num_words:
        generator = random.Random(0)
        words = range(2, model.num_words)
        return [generator.choices(words, k=PROMPT_TOKENS) for _ in range(number)]
    chats = Conversations(tokenizer)
    texts = held_out_prompts(number, 0)
    return [chats.prompt_ids([{"role": "user", "content": text}]) for text in texts]


def agreement(one: Rollout, other: Rollout) -> float:
    """Share of identical responses."""
    pairs = zip(one.responses, other.responses, strict=True)
    return sum(a == b for a, b in pairs) / len(one.responses)


def measure(options: Options) -> dict[str, Any]:
    model = get_model(options.model)
    if options.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    dtype = getattr(torch, options.dtype)
    frozen = AutoModelForCausalLM.from_pretrained(model.directory, dtype=dtype)
    frozen.to(options.device).eval().requires_grad_(False)
    base = identify(str(model.directory))
    network = load(model.proxy, base=base).network.to(options.device)
    prompts = make_prompts(model, tokenizer, options.episodes)
    engine = VLLMBackend(
        frozen,
        model.directory,
        base,
        max_tokens=max(map(len, prompts)) + options.decoding.max_new_tokens,
        max_requests=min(options.episodes, options.max_requests),
        memory=options.memory,
    )
    ends = end_ids(frozen, tokenizer)
    clock = Clock(is_cuda=options.device == "cuda")

    def roll_out(kind: str, index: int) -> Rollout:
        seeds = count(index * options.episodes)
        with clock.part(kind):
            if kind == "vllm":
                return engine.generate(
                    network, prompts, options.decoding, end_ids=ends, seeds=seeds
                )
            policy = Policy(frozen, network)
            return generate(policy, prompts, options.decoding, end_ids=ends, seeds=seeds)

    rounds = []
    for index in range(-1, options.rounds):
        kinds = ["transformers", "vllm"][:: 1 if index % 2 else -1]
        rollouts = {kind: roll_out(kind, index % 2**31) for kind in kinds}
        seconds = clock.take()
        if index >= 0:
            rounds.append(
                {
                    **{kind: rollouts[kind].counts.tokens / seconds[kind] for kind in kinds},
                    "same_responses": agreement(rollouts["transformers"], rollouts["vllm"]),
                    "tokens": rollouts["transformers"].counts.tokens,
                }
            )
    columns = {name: [one[name] for one in rounds] for name in rounds[0]}
    return {
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "episodes": options.episodes,
        "medians": {name: median(values) for name, values in columns.items()},
        "vllm_over_transformers": compare(columns["vllm"], columns["transformers"]),
        "rounds": rounds,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the metrics as a table for the docs."""
    medians, ratio = figures["medians"], figures["vllm_over_transformers"]
    head = ["model", "dtype", "responses", "tokens of each", "transformers", "vLLM", "ratio"]
    head += ["paired ratios: median [quartiles]", "same responses"]
    quartiles = [ratio[f"paired_quartile_{end}"] for end in ("low", "high")]
    cells = [figures["model"], figures["dtype"], str(figures["episodes"])]
    cells += [f"{medians['tokens'] / figures['episodes']:.1f}"]
    cells += [f"{medians[kind]:.4g}" for kind in ("transformers", "vllm")]
    cells += [f"{ratio['ratio']:.2f}"]
    cells += [f"{ratio['paired_median']:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]"]
    cells += [f"{medians['same_responses']:.0%}"]
    for line in (head, ["---"] * len(head), cells):
        print(f"| {' | '.join(line)} |")


def main(options: Options) -> None:
    figures = measure(options)
    show(figures)
    write_figures(options.output, figures)


if __name__ == "__main__":
    main(read_options(Options, __doc__))
