"""The hook: what happens to the logits of one step. Both of vLLM's samplers call these functions.

    rows that a proxy decides: nucleus -> accept logits -> decision -> history
    all rows, if a shadow is loaded: what it would have done

R = logits rows, A = rows that a proxy decides, K = candidates, V = vocabulary.
"""

import math
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from proxy.acceptance import accept_mask, draw_noise, proposal_times, settle
from proxy.history import History
from proxy.plan import Plan


class Step(NamedTuple):
    """What the worker knows about the step under way and vLLM's sampler is not told."""

    plan: Plan
    hidden: Tensor  # [R, H], the lm_head's input, row by row that of the logits
    positions: Tensor  # [R or more] int, index of the token to be drawn
    discarded: Tensor | None  # [R] bool, rows of unfinished prefills; None = no row
    history: History


def align(
    step: Step,
    logits: Tensor,  # [R, V], constraints and penalties applied
    *,
    tempered: bool,  # they have been divided by `plan.divisors`
) -> Tensor:
    """The law, for the rows that have a proxy: token ids [A] int64."""
    rows, start = step.plan.aligned, perf_counter()
    assert rows is not None
    decision, tracing = rows.decide(logits, step.hidden, step.positions, tempered=tempered)
    discarded = None if step.discarded is None else rows.pick(step.discarded)
    step.history.record(rows, decision, discarded, tracing)
    step.history.record_seconds(perf_counter() - start)
    return decision.token_ids


def score_shadows(
    step: Step,
    logits: Tensor,  # [R, V]
    sampled: Tensor,  # [R] int64, what is said
    *,
    tempered: bool,  # the logits have been divided by `plan.divisors`
) -> None:
    """What each shadow proxy would have done with the tokens that are said, for the metrics.

    It is put the token that is said first, and the rest of the nucleus in the law's order: it
    decides otherwise where it rejects that token and ends up with another.
    """
    divisors = step.plan.divisors if tempered else None
    for rows in step.plan.shadows:
        settings = rows.settings
        temperature = settings.temperature
        if divisors is not None:
            undone = 1 / rows.pick(divisors)
            temperature = undone if temperature is None else temperature * undone
        candidates = rows.candidates(logits, temperature)
        accept_logits = rows.accept_logits(step.hidden, candidates)
        num_rows, num_slots = candidates.token_ids.shape
        race, coins = draw_noise(num_rows, num_slots, logits.device).unbind(1)
        said = rows.pick(sampled)
        is_inside = candidates.logprobs > -math.inf
        is_said = is_inside & (candidates.token_ids == said.unsqueeze(-1))  # [A, K]
        times = proposal_times(
            candidates, race, sharpness=settings.sharpness, greedy=settings.greedy
        )
        accepts = accept_mask(
            candidates,
            accept_logits,
            coins,
            strength=None,
            max_rejections=settings.max_rejections,
            greedy=settings.greedy,
        )
        said_first = times.masked_fill(is_said, -math.inf)
        decision = settle(candidates, said_first, accepts, settings.max_rejections)
        scored = is_said.any(-1)
        if step.discarded is not None:
            scored = scored & ~rows.pick(step.discarded)
        step.history.record_shadow(rows.proxies[0], scored, decision.token_ids != said)
