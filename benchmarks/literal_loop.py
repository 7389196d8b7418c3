"""The paper's loop compared with one-pass accept/reject sampling: `python -m benchmarks.literal_loop`.

The paper's proxy reads the hidden state *after* a candidate, so every candidate costs a forward of the LLM: that of an
accepted one serves the next position too, that of a rejected one is wasted. Our proxy scores all candidates of a
position from the hidden state before them. Both run here on the demo's LLM in transformers, one conversation at a time,
and a hook counts the forwards.

The loop runs the LLM on every candidate and then evaluates the demo's proxy on that candidate alone. This proxy was
trained on the state before the candidate and receives that one, so both methods sample from the same distribution and
reject equally often: the loop is the only difference.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from benchmarks.models import DEMO
from benchmarks.toy_prompts import held_out_prompts
from judge.options import read_options
from proxy.acceptance import Candidates, nucleus
from proxy.checkpoint import identify, load
from training.conversations import Conversations
from training.models import load_model
from training.policy import Decoding, Policy
from training.rollout import generate

DECODING = Decoding()


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path = DEMO / "model"
    """The frozen LLM."""
    proxy: Path = DEMO / "proxies" / "aligned"
    """A proxy for it."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Strengths; stricter proxies reject more."""
    num_prompts: int = 50
    """Prompts of the toy data, one after another."""
    seed: int = 0
    """Seed of all noise."""
    output: Path | None = None
    """A JSON file for the figures."""


@dataclass(frozen=True)
class Cost:
    """The cost of some responses."""

    tokens: int
    rejected: int
    forwards: int
    """Forwards of the LLM, including the prompt's."""
    cpu_seconds: float
    """CPU seconds of this process, which has one thread; they vary less than wall time on a shared machine."""


@torch.inference_mode()
def literal_loop(
    policy: Policy, prompt: list[int], generator: torch.Generator, *, end_id: int
) -> tuple[list[int], int]:
    """(response, rejections) by the paper's loop: propose, run the LLM, evaluate the proxy, repeat if rejected."""
    model, max_rejections = policy.model, policy.config.max_rejections
    cache = DynamicCache(config=model.config)
    logits, hidden = forward(policy, prompt, cache)
    response: list[int] = []
    num_rejected = 0
    while len(response) < DECODING.max_new_tokens:
        candidates = propose(policy, logits)
        left = candidates.logprobs[0].exp()
        num_asked, size = 0, int((left > 0).sum())
        while True:
            forced = num_asked == min(size, max_rejections)
            slot = 0 if forced else int(left.multinomial(1, generator=generator))
            token = int(candidates.token_ids[0, slot])
            after = forward(policy, [token], cache)
            if forced or size == 1 or accepts(policy, hidden, candidates, slot, generator):
                break
            cache.crop(-1)  # undo the forward of the rejected token
            left[slot] = 0.0
            num_asked += 1
        num_rejected += num_asked
        response.append(token)
        logits, hidden = after
        if token == end_id:
            break
    return response, num_rejected


def accepts(
    policy: Policy,
    hidden: torch.Tensor,
    candidates: Candidates,
    slot: int,
    generator: torch.Generator,
) -> bool:
    """The proxy's decision on one candidate."""
    one = Candidates(*(part[:, slot : slot + 1] for part in candidates))
    accept = policy.accept_logits(hidden, one).sigmoid() ** policy.strength
    return bool(torch.rand((), generator=generator) < accept)


def forward(
    policy: Policy, token_ids: list[int], cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, V] and the head's input [1, H] after the last of the tokens."""
    with head_input(policy) as taps:
        output = policy.model(
            input_ids=torch.tensor([token_ids]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float(), taps[0]


@contextmanager
def head_input(policy: Policy) -> Iterator[list[torch.Tensor]]:
    taps: list[torch.Tensor] = []
    head = policy.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: taps.append(inputs[0][:, -1]))
    try:
        yield taps
    finally:
        handle.remove()


def propose(policy: Policy, logits: torch.Tensor) -> Candidates:
    top_k, top_p = torch.tensor([DECODING.top_k]), torch.tensor([DECODING.top_p])
    return nucleus(logits, policy.config.max_candidates, top_k, top_p)


@contextmanager
def counted_forwards(policy: Policy) -> Iterator[list[int]]:
    """A list with one entry, the number of forwards so far."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    handle = policy.model.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def cost_of_literal(policy: Policy, prompts: list[list[int]], end_id: int, seed: int) -> Cost:
    generator = torch.Generator().manual_seed(seed)
    tokens = rejected = 0
    start = time.process_time()
    with counted_forwards(policy) as forwards:
        for prompt in prompts:
            response, num_rejected = literal_loop(policy, prompt, generator, end_id=end_id)
            tokens += len(response)
            rejected += num_rejected
    return Cost(tokens, rejected, forwards[0], time.process_time() - start)


def cost_of_one_pass(policy: Policy, prompts: list[list[int]], end_id: int, seed: int) -> Cost:
    tokens = rejected = 0
    start = time.process_time()
    with counted_forwards(policy) as forwards:
        for index, prompt in enumerate(prompts):
            rollout = generate(policy, [prompt], DECODING, end_ids={end_id}, seeds=[seed + index])
            tokens += rollout.counts.tokens
            rejected += rollout.counts.rejected
    return Cost(tokens, rejected, forwards[0], time.process_time() - start)


def measure(options: Options) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(options.model))
    model.to(torch.bfloat16).eval()
    network = load(options.proxy, base=identify(str(options.model))).network
    chats = Conversations(tokenizer)
    texts = held_out_prompts(options.num_prompts, options.seed)
    prompts = [chats.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    rows = []
    for strength in options.strengths:
        policy = Policy(model, network, strength)
        for method in (cost_of_literal, cost_of_one_pass):
            method(policy, prompts[:2], tokenizer.eos_token_id, options.seed)  # warms up
        rows.append(
            {
                "strength": strength,
                "prompts": len(prompts),
                "literal": asdict(
                    cost_of_literal(policy, prompts, tokenizer.eos_token_id, options.seed)
                ),
                "one_pass": asdict(
                    cost_of_one_pass(policy, prompts, tokenizer.eos_token_id, options.seed)
                ),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "strength",
        "method",
        "rejected per token",
        "LLM forwards per token",
        "tokens per CPU second",
    )
    for row in rows:
        for method in ("literal", "one_pass"):
            cost = row[method]
            table.add_row(
                f"{row['strength']:g}",
                method.replace("_", " "),
                f"{cost['rejected'] / cost['tokens']:.3f}",
                f"{cost['forwards'] / cost['tokens']:.3f}",
                f"{cost['tokens'] / cost['cpu_seconds']:.0f}",
            )
    Console().print(table)


def main(options: Options) -> None:
    rows = measure(options)
    show(rows)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(read_options(Options, __doc__))
