"""What the methods in transformers share: an LLM that reads token by token, what a method is given, and what it did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.acceptance import Candidates
from training.adapters import CausalLM
from training.model_inputs import pad_left
from training.policy import Decoding, Policy
from training.prompts import Prompt
from training.rewards import Frozen, Reward, Sample


class Generation(NamedTuple):
    """A response to each prompt, and the passes it took: one for each sequence and call of a model."""

    responses: list[list[int]]  # token ids, with the end of the turn if it was reached
    llm_passes: int
    reward_passes: int
    """Of the reward, or of the model that guides. 0 = it is a formula of the text."""


Decode = Callable[[Sequence[Prompt], int], Generation]
"""Prompts and a seed -> responses."""


@dataclass(frozen=True)
class Scale:
    """What a method's paper sets by hand for its models, here by answers of the frozen LLM to other prompts."""

    mean: float
    std: float
    goal: float
    """The reward's 90th percentile, in standard deviations above its mean."""
    entropy: float
    """The 85th percentile of the next token's entropy, in nats."""


@dataclass(frozen=True)
class Lab:
    """A world in transformers."""

    frozen: Frozen
    decoding: Decoding
    reward: Reward
    passes_of_reward: int
    """Forward passes that a score takes."""
    beta: float | None
    """Of an implicit reward, β Σ_t log π_guide(y_t) / π(y_t); None = the reward is of another kind than the guide."""
    guide: "Guide"
    scale: Scale

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """The reward in standard deviations from its mean among the frozen LLM's answers: [N]."""
        return (self.reward(samples).cpu() - self.scale.mean) / self.scale.std


@dataclass(frozen=True)
class Guide:
    """An autoregressive reward: Σ_t log π_guide(y_t) / π(y_t), of another LM with the same vocabulary."""

    model: CausalLM
    read: Callable[[Prompt], list[int]]
    """The prompt as the guide reads it."""


class Reader:
    """N sequences that a causal LM reads token by token, with a key-value cache."""

    def __init__(self, model: CausalLM, prompts: Sequence[list[int]]) -> None:
        self._model, self._cache = model, None
        self._inputs = pad_left(prompts, model.device)

    def logits(self) -> Tensor:
        """Of the next token, after everything that was read: [N, V]."""
        output = self._model(
            **self._inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        """The next token of each sequence: [N]."""
        mask, positions = self._inputs["attention_mask"], self._inputs["position_ids"]
        self._inputs = {
            "input_ids": tokens.unsqueeze(-1),
            "attention_mask": torch.cat([mask, mask.new_ones(len(tokens), 1)], -1),
            "position_ids": positions[:, -1:] + 1,
        }


class Responses:
    """N responses that grow until each has ended."""

    def __init__(self, count: int, end_ids: set[int], max_tokens: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._end_ids, self._max_tokens = end_ids, max_tokens

    @property
    def growing(self) -> list[int]:
        """The indices of those that have not ended."""
        return [i for i, tokens in enumerate(self.tokens) if not self.is_finished(tokens)]

    def is_finished(self, tokens: list[int]) -> bool:
        return len(tokens) >= self._max_tokens or (bool(tokens) and tokens[-1] in self._end_ids)


def draw(candidates: Candidates, generator: torch.Generator) -> Tensor:
    """A token of each row: [R]."""
    slots = torch.multinomial(candidates.logprobs.exp(), 1, generator=generator)
    return candidates.token_ids.gather(-1, slots).squeeze(-1)


def sampler(lab: Lab) -> Callable[[Tensor], Candidates]:
    """Logits [R, V] -> what the frozen LLM would draw from."""
    policy = Policy(lab.frozen.model)
    return lambda logits: policy.candidates(logits, lab.decoding)
