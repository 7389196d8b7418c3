"""The hook: what happens to the logits of one step. Both of vLLM's samplers call these functions.

    rows that a proxy decides: nucleus -> accept logits -> decision -> history
    all rows, if a shadow is loaded: what it would have done

R = logits rows, A = rows that a proxy decides, K = candidates, V = vocabulary.
"""

import math
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.acceptance import accept_mask, draw_noise, nucleus, proposal_times, settle
from proxy.history import History
from proxy.plan import Plan
from proxy.rows import Shadow


class Step(NamedTuple):
    """What the worker knows about the step under way and vLLM's sampler is not told."""

    plan: Plan
    hidden: Tensor  # [R, H], the lm_head's input, row by row that of the logits
    positions: Tensor  # [R or more] int, index of the token to be drawn
    discarded: Tensor | None  # [R] bool, rows of unfinished prefills; None = no row
    shadows: Sequence[Shadow]
    history: History


def align(
    step: Step,
    logits: Tensor,  # [R, V], constraints and penalties applied
    top_k: Tensor | None,  # [R] int, V = off
    top_p: Tensor | None,  # [R] float, 1 = off
    *,
    tempered: bool,  # the logits have been divided by the temperature
) -> Tensor:
    """The law, for the rows that have a proxy: token ids [A] int64."""
    rows, start = step.plan.aligned, perf_counter()
    assert rows is not None
    decision, tracing = rows.decide(
        logits, step.hidden, step.positions, top_k, top_p, tempered=tempered
    )
    discarded = None if step.discarded is None else rows.pick(step.discarded)
    step.history.record(rows, decision, discarded, tracing)
    step.history.record_seconds(perf_counter() - start)
    return decision.token_ids


def score_shadows(
    step: Step,
    logits: Tensor,  # [R, V], tempered
    top_k: Tensor | None,  # [R]
    top_p: Tensor | None,  # [R]
    sampled: Tensor,  # [R] int64, what is said
) -> None:
    """What each shadow proxy would have done with the tokens that are said, for the metrics.

    It is put the token that is said first, and the rest of the nucleus in the law's order: it
    decides otherwise where it rejects that token and ends up with another.
    """
    plan = step.plan
    if plan.shadowed is None:
        return
    for shadow in step.shadows:
        config = shadow.proxy.config
        candidates = nucleus(logits, config.max_candidates, top_k, top_p)
        accept_logits = shadow.accept_logits(step.hidden, candidates)
        rows, num_slots = candidates.token_ids.shape
        race, coins = draw_noise(rows, num_slots, logits.device).unbind(1)
        is_said = candidates.token_ids == sampled.unsqueeze(-1)  # [R, K]
        times = proposal_times(candidates, race, plan.greedy)
        accepts = accept_mask(candidates, accept_logits, coins, strength=None, greedy=plan.greedy)
        limits = torch.full_like(sampled, config.max_rejections)
        decision = settle(candidates, times.masked_fill(is_said, -math.inf), accepts, limits)
        scored = plan.shadowed & is_said.any(-1)
        if step.discarded is not None:
            scored = scored & ~step.discarded
        step.history.record_shadow(shadow.proxy, scored, decision.token_ids != sampled)
