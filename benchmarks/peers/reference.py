"""What the methods in transformers are timed beside, there: the frozen LLM, the proxy, and best of N by the reward."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.decoders import Decode, Generation, Lab
from benchmarks.peers.setting import N
from proxy.checkpoint import load
from training.policy import Policy
from training.prompts import Prompt, samples_of
from training.rollout import generate


def sampled(lab: Lab, proxy: Path | None = None) -> Decode:
    """One sample, of the frozen LLM or with a proxy."""
    network = load(proxy, base=lab.frozen.base).network if proxy else None

    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        responses = generate(
            Policy(lab.frozen.model, network),
            [prompt.ids for prompt in prompts],
            lab.decoding,
            end_ids=lab.frozen.end_ids,
            seeds=[(seed << 16) + i for i in range(len(prompts))],
        ).responses
        return Generation(responses, sum(map(len, responses)), 0)

    return decode


def best_of(lab: Lab, n: int = N) -> Decode:
    """The sample of highest reward, of `n` in one batch."""
    one = sampled(lab)

    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        drawn = one([prompt for prompt in prompts for _ in range(n)], seed)
        owners = [prompt for prompt in prompts for _ in range(n)]
        rewards = lab.score(samples_of(lab.frozen.tokenizer, owners, drawn.responses))
        best = rewards.view(-1, n).argmax(-1) + n * torch.arange(len(prompts))
        chosen = [drawn.responses[i] for i in best.tolist()]
        return Generation(chosen, drawn.llm_passes, len(owners) * lab.passes_of_reward)

    return decode
