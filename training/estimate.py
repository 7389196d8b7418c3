"""What training a proxy takes in memory and time, from the LLM's config alone: no weights, no GPU.

    python -m training.estimate --model Qwen/Qwen2.5-7B-Instruct

Memory is counted in tensors: those that stay, and those of each phase (rollout, reward, update), of which the largest
counts. What the allocator and the kernels keep on top is not in it: leave a tenth of the device free. Time is a
roofline: each pass takes its floating-point operations, the bytes that it reads or the launch of its kernels, whichever
is slowest on a device that reaches `efficiency` of its figures. `tests/training/test_estimate.py` holds the formulas
against tensors and operations counted in real runs of small models; `docs/seven-b.md` has the table for a 7B model.

N responses at once, T = prompt + response tokens, L layers, H hidden, I feed-forward, V vocabulary, b bytes a number.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from judge.options import NonNegative, Positive, PositiveShare
from proxy.network import ProxyConfig, ProxyNetwork
from training.console import TrainingError, main_guard, read_options

GB = 1e9


@dataclass(frozen=True)
class Options:
    """The run, and the device. The defaults of the run are `training.proxy_ppo`'s."""

    model: str
    """A directory or a hub id; only its config is read."""
    prompt_tokens: PositiveInt = 512
    """Tokens of a prompt; all are taken to be as long as the longest."""
    response_tokens: PositiveInt = 64
    """`--decoding.max-new-tokens`; all responses are taken to be as long."""
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
    """Candidates put to the proxy at a position."""
    reward: Literal["lora", "implicit", "scalar", "none"] = "lora"
    """What scores responses: "lora" and "implicit" from the LLM, "scalar" of the LLM's size, "none" = no model."""
    lora_rank: PositiveInt = 16
    """Of the reward model."""
    pairs: PositiveInt = 20_000
    """Preference pairs that the LoRA is trained on, once."""
    pair_batch: PositiveInt = 4
    """Pairs at once in the LoRA's training, with gradient checkpointing."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen LLM computes in."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses. vLLM wants a copy of the LLM for itself, and is faster than estimated here."""
    rollout_memory: PositiveShare = 0.3
    """Share of the device that vLLM is given."""
    memory: Positive = 80e9
    """Bytes of the device. This and the next two are an H100 SXM's, as NVIDIA's data sheet has them."""
    flops: Positive = 989e12
    """Floating-point operations per second, dense, in `dtype`."""
    bandwidth: Positive = 3.35e12
    """Bytes per second between memory and cores."""
    efficiency: PositiveShare = 0.4
    """Share of both figures that the work reaches: an assumption."""
    launch: NonNegative = 1e-3
    """Seconds that Python takes to launch a layer's kernels, the least that a layer can take: an assumption."""


class Sizes(NamedTuple):
    """What of an LLM memory and time depend on."""

    parameters: int  # all, tied ones once
    linear: int  # weights of the linear layers but the head
    lora: int  # in + out, summed over these layers: a LoRA's parameters at rank 1
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads · size of a head
    key: int  # heads of keys · size of a head
    vocab: int


def sizes_of(model: str) -> Sizes:
    """Read from a config, and from a model of it that has no weights.

    Raises:
        TrainingError: there is no such config, or none of a transformer.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config may lack anything
        raise TrainingError(f"cannot read the config of {model!r}: {error}") from error
    text, head = config.get_text_config(), empty.get_output_embeddings()
    linear = [
        module.weight
        for module in empty.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        linear=sum(weight.numel() for weight in linear),
        lora=sum(sum(weight.shape) for weight in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocab=head.weight.shape[0],
    )


def forward_flops(sizes: Sizes, rows: int, tokens: int, seen: int, kept: int) -> int:
    """Multiplications and additions of a forward.

    Args:
        rows: sequences.
        tokens: read in this forward, of each sequence.
        seen: that a token may attend to, those of this forward included; computed in full, causal or not.
        kept: positions of each sequence whose logits are computed.
    """
    linear = 2 * sizes.linear * tokens
    attention = 4 * sizes.layers * sizes.query * tokens * seen
    return rows * (linear + attention + 2 * sizes.hidden * sizes.vocab * kept)


def cache_bytes(sizes: Sizes, rows: int, tokens: int, size: int) -> int:
    """Keys and values of all layers; a sliding window may keep fewer."""
    return 2 * sizes.layers * sizes.key * size * rows * tokens


def activation_bytes(sizes: Sizes, tokens: int, size: int) -> int:
    """The most that a forward without gradients holds at once, in a gated feed-forward layer and fused attention."""
    return tokens * (3 * sizes.intermediate + 5 * sizes.hidden) * size


def checkpointed_bytes(sizes: Sizes, tokens: int) -> int:
    """The same with gradients to a LoRA in bfloat16: a state of every layer, and all that one layer keeps for them."""
    layer = 7 * sizes.intermediate + 20 * sizes.hidden
    return tokens * (sizes.layers * sizes.hidden + layer) * 2


def float32_bytes(numbers: int, size: int) -> int:
    """Numbers, their float32 copy if they are in bfloat16, and another of what is computed from them."""
    return numbers * (size + (4 if size < 4 else 0) + 4)


def decision_bytes(sizes: Sizes, decisions: int, size: int) -> int:
    """Recorded decisions: hidden state, token, log-probability, answer, episode."""
    return decisions * (sizes.hidden * size + 8 + 4 + 1 + 8)


def proxy_of(sizes: Sizes, width: int) -> ProxyNetwork:
    with torch.device("meta"):
        return ProxyNetwork(
            ProxyConfig(hidden_size=sizes.hidden, vocab_size=sizes.vocab, width=width)
        )


class Estimate(NamedTuple):
    """Bytes and seconds, by what they are for."""

    staying: dict[str, float]  # in memory all the time
    phases: dict[str, float]  # on top of it, one after the other
    seconds: dict[str, float]  # of one update
    lora_bytes: float  # at most, while the reward's LoRA is trained
    lora_seconds: float

    @property
    def peak(self) -> float:
        return sum(self.staying.values()) + max(self.phases.values())


def estimate(sizes: Sizes, options: Options) -> Estimate:
    """Memory and time of `training.proxy_ppo`, and of the LoRA's training before it."""
    size = 2 if options.dtype == "bfloat16" else 4
    prompt, response, rows = options.prompt_tokens, options.response_tokens, options.batch_size
    total, batches = prompt + response, -(-options.episodes // options.batch_size)
    weights = sizes.parameters * size
    lora = sizes.lora * options.lora_rank
    decisions = round(options.episodes * response * options.decisions_per_token)
    recorded = decision_bytes(sizes, decisions, size)
    proxy = proxy_of(sizes, options.width).num_parameters()
    table = sizes.vocab * 2 * options.width * 4
    passes = {"lora": 2, "implicit": 2, "scalar": 1, "none": 0}[options.reward]
    kept = response + 1 if passes == 2 else 0

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
    # The rollout begins with a table made of all embeddings; the update copies the decisions and looks up theirs.
    cache = cache_bytes(sizes, rows, total, size)
    in_transformers = options.rollout == "transformers"
    phases: dict[str, float] = {
        "rollout": table
        + in_transformers
        * max(
            float32_bytes(sizes.vocab * sizes.hidden, size) - sizes.vocab * sizes.hidden * size,
            cache + activation_bytes(sizes, rows * prompt, size),
            cache + float32_bytes(rows * sizes.vocab, size),
        ),
        "reward": max(
            activation_bytes(sizes, rows * total, size),
            float32_bytes(rows * kept * sizes.vocab, size),
        )
        * (passes > 0),
        "update": recorded + float32_bytes(decisions * sizes.hidden, size),
    }

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
        # forward and backward, three times a forward; float32 at a tenth of the speed
        "update": options.epochs * 60 * proxy * decisions / options.flops / options.efficiency,
    }
    # Forward, the same again for the checkpoints, backward through the frozen weights, and the reference's forward.
    pair_flops = 4 * forward_flops(sizes, 2, total, total, response)
    return Estimate(
        staying,
        phases,
        times,
        lora_bytes=sizes.parameters * 2
        + lora * 16
        + checkpointed_bytes(sizes, 2 * options.pair_batch * total),
        lora_seconds=options.pairs / options.pair_batch * seconds(options.pair_batch * pair_flops),
    )


def show(sizes: Sizes, options: Options, result: Estimate) -> None:
    """Print the estimate."""
    memory = Table("memory of training.proxy_ppo", "GB")
    for name, bytes_ in result.staying.items():
        memory.add_row(name, f"{bytes_ / GB:.2f}")
    for name, bytes_ in result.phases.items():
        memory.add_row(f"+ {name}", f"{bytes_ / GB:.2f}")
    memory.add_row("at most", f"{result.peak / GB:.1f}")
    memory.add_row("training.reward_model, LoRA, at most", f"{result.lora_bytes / GB:.1f}")
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
    for command, most, option in (
        ("training.proxy_ppo", result.peak, "--batch-size"),
        ("training.reward_model", result.lora_bytes, "--pair-batch"),
    ):
        if most > 0.9 * options.memory:
            print(
                f"{command} does not fit {options.memory / GB:.0f} GB, a tenth left free: lower {option}"
            )


def main(options: Options) -> None:
    sizes = sizes_of(options.model)
    show(sizes, options, estimate(sizes, options))


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
