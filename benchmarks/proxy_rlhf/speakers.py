"""Ways to answer the bundled world's prompts, and how they are graded.

The divergence is KL(what tokens are drawn from ‖ the frozen LLM at temperature 1, nothing cut off), exact at every
position and summed over a response: one reference for all, so that also sharper decoding and tuned models have one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from proxy.acceptance import Candidates, Decision
from training.evaluate import flaw_rates, win_rate
from training.policy import Decoding, Draw, Policy, Proposals
from training.rollout import HeadInput, Rollout, generate, pad_responses

_CHUNK = 64  # responses at once


class ThresholdPolicy(Policy):
    """Accepts where a ≥ 1/2, instead of with probability a."""

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        certain = torch.finfo(torch.float32).max
        return torch.where(super().accept_logits(hidden, candidates) >= 0, certain, -certain)


class RepeatingPolicy(Policy):
    """SKAM without its second part: a rejected candidate may be proposed again."""

    def decide(
        self, candidates: Candidates, accept_logits: Tensor, draw: Draw, decoding: Decoding
    ) -> tuple[Decision, Proposals]:
        assert decoding.temperature == self.config.temperature
        probabilities, limit = candidates.logprobs.exp(), self.config.max_rejections
        # The clocks' noise, which nobody else needs here, seeds as many draws as there may be.
        noise = draw(candidates.token_ids)
        generator = torch.Generator().manual_seed(int(noise[:, 0, 0].view(torch.int32).sum()))
        slots = probabilities.multinomial(limit, replacement=True, generator=generator)  # [R, M]
        coins = torch.rand(slots.shape, generator=generator)
        one = (probabilities > 0).sum(-1, keepdim=True) == 1
        accepted = (coins < accept_logits.gather(-1, slots).sigmoid()) | one
        forced = ~accepted.any(-1)
        first = accepted.int().argmax(-1)
        chosen = slots.gather(-1, first[:, None])[:, 0].masked_fill(forced, 0)
        asked = torch.where(forced, limit, first + 1)
        tokens = candidates.token_ids.gather(-1, chosen[:, None])[:, 0]
        decision = Decision(torch.stack((chosen, tokens, asked, forced.long())))
        rows, turns = torch.nonzero(torch.arange(limit) < asked[:, None], as_tuple=True)
        return decision, Proposals(rows, slots[rows, turns], accepted[rows, turns])

    def emission(self, candidates: Candidates, accept_logits: Tensor, decoding: Decoding) -> Tensor:
        """P(token of each slot is emitted): p a (1 − r^M) / (1 − r), and r^M for the most probable; r = 1 − Σ p a."""
        taken = candidates.logprobs.double().exp() * accept_logits.double().sigmoid()
        rejected = 1 - taken.sum(-1, keepdim=True)
        never = rejected**self.config.max_rejections
        probabilities = taken * (1 - never) / (1 - rejected).clamp(min=1e-12)
        probabilities[:, :1] += never
        one = (candidates.logprobs > -torch.inf).sum(-1, keepdim=True) == 1
        first = torch.arange(probabilities.shape[-1]) == 0
        return torch.where(one, first.double(), probabilities)


@dataclass(frozen=True)
class World:
    """The frozen LLM and the prompts that are answered."""

    model: Any
    tokenizer: Any
    end_ids: set[int]
    texts: list[str]
    prompts: list[list[int]]


@dataclass(frozen=True)
class Answers:
    """Of one way to answer, one to each prompt."""

    responses: list[list[int]]
    texts: list[str]
    acceptance_rate: float
    cpu_seconds: float


def answer(
    world: World, seed: int, roll_out: Callable[[list[list[int]], Iterable[int]], Rollout]
) -> Answers:
    """All prompts answered; the noise of the seed is no other seed's."""
    start = time.process_time()
    rollout = roll_out(world.prompts, count(seed << 32))
    texts = world.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    acceptance = 1 - rollout.counts.rejected / rollout.counts.proposed
    return Answers(rollout.responses, texts, acceptance, time.process_time() - start)


def by_policy(
    world: World, policy: Policy, decoding: Decoding
) -> Callable[[list[list[int]], Iterable[int]], Rollout]:
    return lambda prompts, seeds: generate(
        policy, prompts, decoding, end_ids=world.end_ids, seeds=seeds, batch_size=_CHUNK
    )


def grade(world: World, answers: Answers, frozen: Sequence[str]) -> dict[str, Any]:
    """Gold win rate against the frozen LLM's answers, flaw rates and lengths."""
    rate, error = win_rate(world.texts, answers.texts, frozen)
    return {
        "prompts": len(world.texts),
        "win_rate": rate,
        "win_rate_se": error,
        "flaw_rates": flaw_rates(world.texts, answers.texts),
        "tokens_per_response": sum(map(len, answers.responses)) / len(answers.responses),
        "acceptance_rate": answers.acceptance_rate,
        "answer_cpu_seconds": answers.cpu_seconds,
    }


@torch.inference_mode()
def divergence(
    world: World, responses: Sequence[list[int]], policy: Policy, decoding: Decoding
) -> tuple[float, float]:
    """Nats a response, and the standard error; of the first `len(responses)` prompts."""
    sums: list[float] = []
    for start in range(0, len(responses), _CHUNK):
        some = responses[start : start + _CHUNK]
        ids, is_response = pad_responses(world.prompts[start : start + len(some)], some)
        drawn = is_response[:, 1:]
        with HeadInput(policy.model) as head:
            logits = policy.model(ids).logits[:, :-1][drawn]
        candidates = policy.candidates(logits, decoding)
        accept_logits = policy.accept_logits(head.states[:, :-1][drawn], candidates)
        probabilities = policy.emission(candidates, accept_logits, decoding)
        frozen = logits if policy.model is world.model else world.model(ids).logits[:, :-1][drawn]
        reference = frozen.double().log_softmax(-1).gather(-1, candidates.token_ids)
        ratios = probabilities.clamp(min=1e-300).log() - reference
        terms = torch.where(probabilities > 0, probabilities * ratios, 0.0).sum(-1)
        sums += [part.sum().item() for part in terms.split([len(r) for r in some])]
    values = torch.tensor(sums)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
