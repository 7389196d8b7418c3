"""Answers of a sampling policy to an evaluation set, and their grades by the reference scorer.

The divergence is KL(sampling distribution ‖ the frozen LLM at temperature 1 without cut-offs), exact at every position
and summed over a response. This one reference applies to all methods, including sharper decoding and fine-tuned models.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any

import torch

from training.model_inputs import HeadInput, pad_responses
from training.policy import Decoding, Policy
from training.rollout import Rollout, generate
from training.toy_data.grading import flaw_rates, win_rate

_CHUNK = 64  # responses at once


@dataclass(frozen=True)
class EvaluationSet:
    """The frozen LLM and the prompts that it answers."""

    model: Any
    tokenizer: Any
    end_ids: set[int]
    texts: list[str]
    prompts: list[list[int]]


@dataclass(frozen=True)
class Answers:
    """One answer to each prompt."""

    responses: list[list[int]]
    texts: list[str]
    acceptance_rate: float
    cpu_seconds: float


def answer(
    evaluation: EvaluationSet,
    seed: int,
    roll_out: Callable[[list[list[int]], Iterable[int]], Rollout],
) -> Answers:
    """Answer all prompts, with noise that only this seed has."""
    start = time.process_time()
    rollout = roll_out(evaluation.prompts, count(seed << 32))
    texts = evaluation.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    acceptance = 1 - rollout.counts.rejected / rollout.counts.proposed
    return Answers(rollout.responses, texts, acceptance, time.process_time() - start)


def by_policy(
    evaluation: EvaluationSet, policy: Policy, decoding: Decoding
) -> Callable[[list[list[int]], Iterable[int]], Rollout]:
    return lambda prompts, seeds: generate(
        policy, prompts, decoding, end_ids=evaluation.end_ids, seeds=seeds, batch_size=_CHUNK
    )


def grade(evaluation: EvaluationSet, answers: Answers, frozen: Sequence[str]) -> dict[str, Any]:
    """Win rate against the frozen LLM's answers by the reference scorer, flaw rates and lengths."""
    rate, error = win_rate(evaluation.texts, answers.texts, frozen)
    return {
        "prompts": len(evaluation.texts),
        "win_rate": rate,
        "win_rate_se": error,
        "flaw_rates": flaw_rates(evaluation.texts, answers.texts),
        "tokens_per_response": sum(map(len, answers.responses)) / len(answers.responses),
        "acceptance_rate": answers.acceptance_rate,
        "answer_cpu_seconds": answers.cpu_seconds,
    }


@torch.inference_mode()
def divergence(
    evaluation: EvaluationSet,
    responses: Sequence[list[int]],
    policy: Policy,
    decoding: Decoding,
    *,
    prompts: Sequence[list[int]] | None = None,
    chunk: int = _CHUNK,
) -> tuple[float, float]:
    """Divergence in nats a response and its standard error, over the first `len(responses)` prompts.

    Args:
        evaluation: the frozen LLM and the prompts that it reads.
        responses: of the policy.
        policy: which is measured.
        decoding: under which it answers.
        prompts: that the policy reads, if they are others, for example with a system prompt.
        chunk: responses at once; a large vocabulary needs few.
    """
    sums: list[float] = []
    for start in range(0, len(responses), chunk):
        batch = responses[start : start + chunk]
        plain = evaluation.prompts[start : start + len(batch)]
        read = plain if prompts is None else prompts[start : start + len(batch)]
        ids, is_response = pad_responses(read, batch)
        drawn = is_response[:, 1:]
        with HeadInput(policy.model) as head:
            logits = policy.model(ids).logits[:, :-1][drawn]
        candidates = policy.candidates(logits, decoding)
        accept_logits = policy.accept_logits(head.states[:, :-1][drawn], candidates)
        probabilities = policy.emission(candidates, accept_logits, decoding)
        frozen = logits
        if policy.model is not evaluation.model or prompts is not None:
            ids, is_response = pad_responses(plain, batch)
            frozen = evaluation.model(ids).logits[:, :-1][is_response[:, 1:]]
        reference = frozen.double().log_softmax(-1).gather(-1, candidates.token_ids)
        ratios = probabilities.clamp(min=1e-300).log() - reference
        terms = torch.where(probabilities > 0, probabilities * ratios, 0.0).sum(-1)
        sums += [part.sum().item() for part in terms.split([len(r) for r in batch])]
    values = torch.tensor(sums)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def pooled_error(errors: Sequence[float]) -> float:
    """Standard error of a mean over seeds, as if all prompts of all seeds were independent."""
    return math.sqrt(fmean(error**2 for error in errors) / len(errors))
