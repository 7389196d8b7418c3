"""Memory and time of training a proxy, from the LLM's config alone: no weights, no GPU.

    python -m training.estimate --model Qwen/Qwen2.5-7B-Instruct

Memory is the sum of tensors: those that are always there, plus those of the largest phase (rollout, reward, update).
Overhead of the allocator and of kernels is not included: leave a tenth of the device free. Time is a roofline estimate:
each pass takes as long as the slowest of its floating-point operations, the bytes that it reads and the launches of its
kernels, on a device that reaches `efficiency` of its data sheet. `tests/training/test_estimate.py` compares the
formulas with tensors and operations counted in real runs of small models; `docs/seven-b.md` has the table for a 7B
model.

N responses at once, T = prompt + response tokens, L layers, H hidden, I feed-forward, V vocabulary, b bytes a number.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table

from judge.options import NonNegative, Positive, PositiveShare
from proxy.network import ProxyConfig, ProxyNetwork
from training.console import main_guard, read_options
from training.logprobs import CHUNK
from training.machine import USED, Machine
from training.memory import GB, MOST_TOKENS, Need, Plan, Work, fit
from training.sizes import (
    Sizes,
    activation_bytes,
    cache_bytes,
    decision_bytes,
    float32_bytes,
    forward_flops,
    rollout_bytes,
    sizes_of,
)


@dataclass(frozen=True)
class Options:
    """The run and the device. The defaults of the run are those of `training.proxy_ppo`."""

    model: str
    """A directory or a hub id; only its config is read."""
    prompt_tokens: PositiveInt = 512
    """Tokens of a prompt; all prompts count as that long."""
    response_tokens: PositiveInt = 64
    """`--decoding.max-new-tokens`; all responses count as that long."""
    steps: PositiveInt = 60
    """Updates of the proxy."""
    episodes: Annotated[int, Field(ge=2)] = 256
    """Responses in a rollout."""
    batch_size: PositiveInt = 64
    """Responses at once in the device's memory, N."""
    epochs: PositiveInt = 4
    """Passes over a rollout's decisions."""
    width: Annotated[int, Field(ge=2)] = 64
    """Width of the proxy's layers."""
    decisions_per_token: Positive = 1.5
    """Candidates that the proxy decides at a position."""
    reward: Literal["lora", "implicit", "scalar", "none"] = "lora"
    """The reward: "lora" and "implicit" are made from the LLM, "scalar" has the LLM's size, "none" = no model."""
    lora_rank: PositiveInt = 16
    """Rank of the reward's LoRA."""
    pairs: PositiveInt = 20_000
    """Preference pairs that the LoRA is trained on, in one pass."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen LLM."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """The backend that samples responses. vLLM needs a copy of the LLM, and is faster than estimated here."""
    rollout_memory: PositiveShare = 0.3
    """Share of the device's memory for vLLM."""
    memory: Positive = 80e9
    """Bytes of the device. The defaults of this and of the next two options are an H100 SXM's, from NVIDIA's data
    sheet.
    """
    flops: Positive = 989e12
    """Floating-point operations per second, dense, in `dtype`."""
    bandwidth: Positive = 3.35e12
    """Bytes per second between memory and compute units."""
    efficiency: PositiveShare = 0.4
    """Share of both figures that is reached: an assumption."""
    launch: NonNegative = 1e-3
    """Seconds that Python takes to launch a layer's kernels, a lower bound of a layer's time: an assumption."""


def proxy_of(sizes: Sizes, width: int) -> ProxyNetwork:
    with torch.device("meta"):
        return ProxyNetwork(
            ProxyConfig(hidden_size=sizes.hidden, vocab_size=sizes.vocab, width=width)
        )


class Estimate(NamedTuple):
    """Bytes and seconds, by purpose."""

    staying: dict[str, float]  # always in memory
    phases: dict[str, float]  # in addition, one phase after another
    seconds: dict[str, float]  # of one update
    lora_seconds: float  # of training the reward's LoRA beforehand

    @property
    def peak(self) -> float:
        return sum(self.staying.values()) + max(self.phases.values())


def estimate(sizes: Sizes, options: Options) -> Estimate:
    """Memory and time of `training.proxy_ppo`, and of training the LoRA before it."""
    return Estimate(*_memory(sizes, options), *_time(sizes, options))


def _memory(sizes: Sizes, options: Options) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that are always used, and those of each phase."""
    size = 2 if options.dtype == "bfloat16" else 4
    prompt, response, rows = options.prompt_tokens, options.response_tokens, options.batch_size
    total = prompt + response
    weights = sizes.parameters * size
    lora = sizes.lora * options.lora_rank
    decisions = round(options.episodes * response * options.decisions_per_token)
    recorded = decision_bytes(sizes, decisions, size)
    proxy = proxy_of(sizes, options.width).num_parameters()
    table = sizes.vocab * 2 * options.width * 4
    passes, kept = _reward_passes(options)

    staying: dict[str, float] = {
        "frozen LLM": weights,
        "reward model": {"lora": lora * 4, "implicit": weights, "scalar": weights, "none": 0}[
            options.reward
        ],
        "proxy, gradients, Adam": proxy * 16,
        "recorded decisions": recorded,
    }
    if options.rollout == "vllm":
        staying["vLLM"] = options.rollout_memory * options.memory
    # The rollout starts with a table made from all embeddings. The update copies the decisions and looks up their rows.
    in_transformers = options.rollout == "transformers"
    embeddings = sizes.vocab * sizes.hidden
    phases: dict[str, float] = {
        "rollout": table
        + in_transformers
        * max(
            float32_bytes(embeddings, size) - embeddings * size,
            rollout_bytes(sizes, rows, prompt, response, size),
        ),
        "reward": max(
            activation_bytes(sizes, rows * total, size),
            float32_bytes(min(rows * kept * sizes.vocab, CHUNK), size),
        )
        * (passes > 0),
        "update": recorded + float32_bytes(decisions * sizes.hidden, size),
    }
    return staying, phases


def _reward_passes(options: Options) -> tuple[int, int]:
    """Forwards that the reward takes, and positions of a response whose logits it needs."""
    passes = {"lora": 2, "implicit": 2, "scalar": 1, "none": 0}[options.reward]
    return passes, options.response_tokens if passes == 2 else 0


def _time(sizes: Sizes, options: Options) -> tuple[dict[str, float], float]:
    """Seconds of an update, and of training the LoRA."""
    size = 2 if options.dtype == "bfloat16" else 4
    prompt, response, rows = options.prompt_tokens, options.response_tokens, options.batch_size
    total, batches = prompt + response, -(-options.episodes // options.batch_size)
    weights = sizes.parameters * size
    decisions = round(options.episodes * response * options.decisions_per_token)
    proxy = proxy_of(sizes, options.width).num_parameters()
    passes, kept = _reward_passes(options)

    def seconds(flops: float, read: float = 0) -> float:
        slower = max(flops / options.flops, read / options.bandwidth)
        return max(slower / options.efficiency, options.launch * sizes.layers)

    middle = prompt + response // 2
    step = seconds(
        forward_flops(sizes, rows, 1, middle, 1),
        weights + cache_bytes(sizes, rows, middle, size),
    )
    times = {
        "prompts": batches * seconds(forward_flops(sizes, rows, prompt, prompt, 1), weights),
        "responses": batches * response * step,
        "reward": batches
        * passes
        * seconds(forward_flops(sizes, rows, total, total, kept), weights),
        # forward and backward take three times a forward; float32 runs at a tenth of the speed
        "update": options.epochs * 60 * proxy * decisions / options.flops / options.efficiency,
    }
    # Forward, the recomputation of the checkpoints, backward through the frozen weights, and the reference's forward.
    # A pair is one sequence. As many pairs are taken at once as make a GPU's matrix products large.
    pair = total + response
    at_once = max(1, MOST_TOKENS["cuda"] // pair)
    pair_flops = 4 * forward_flops(sizes, 1, pair, pair, 2 * response)
    return times, options.pairs / at_once * seconds(at_once * pair_flops)


def trained(options: Options) -> dict[str, tuple[Plan | None, Need]]:
    """Memory of the commands that train the LLM, or a LoRA on it, by command."""
    pair = options.prompt_tokens + 2 * options.response_tokens
    has = Machine("cuda", options.memory, "of the device")
    work = Work(model=options.model, longest=pair)
    return {
        f"training.reward_model --lora-rank {options.lora_rank}": fit(
            replace(work, lora_rank=options.lora_rank, checkpointing=True), has
        ),
        "training.reward_model, dpo, sft, jsft: all weights": fit(work, has),
    }


def show(
    sizes: Sizes,
    options: Options,
    result: Estimate,
    others: dict[str, tuple[Plan | None, Need]],
) -> None:
    """Print the estimate."""
    memory = Table("memory of training.proxy_ppo", "GB")
    for name, bytes_ in result.staying.items():
        memory.add_row(name, f"{bytes_ / GB:.2f}")
    for name, bytes_ in result.phases.items():
        memory.add_row(f"+ {name}", f"{bytes_ / GB:.2f}")
    memory.add_row("at most", f"{result.peak / GB:.1f}")
    for name, (planned, takes) in others.items():
        tokens = planned.tokens if planned else 0
        how = f"{tokens} tokens at once" if planned else "does not fit with a single pair"
        pair = options.prompt_tokens + 2 * options.response_tokens
        memory.add_row(f"{name}; {how}", f"{takes.of(tokens or pair) / GB:.1f}")
    time = Table("time", "seconds")
    for name, seconds in result.seconds.items():
        time.add_row(name, f"{seconds:.1f}")
    update = sum(result.seconds.values())
    time.add_row("an update", f"{update:.1f}")
    time.add_row(f"{options.steps} updates", f"{update * options.steps:.0f}")
    time.add_row(f"LoRA on {options.pairs} pairs", f"{result.lora_seconds:.0f}")
    console = Console()
    console.print(f"{sizes.parameters:,} parameters; computed, not measured")
    console.print(memory)
    console.print(time)
    if result.peak > USED * options.memory:
        print(
            f"training.proxy_ppo does not fit {options.memory / GB:.0f} GB, a tenth kept free: it will lower "
            "--batch-size"
        )


def main(options: Options) -> None:
    sizes = sizes_of(options.model)
    show(sizes, options, estimate(sizes, options), trained(options))


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
