"""The hook: what happens to the logits of one step. Both samplers call these functions.

    rows with a proxy:   nucleus -> accept logits -> decision -> statistics
    rows with a shadow:  the same, without effect on the tokens

R = logits rows, A = rows that a proxy decides, K = candidates, V = vocabulary.
"""

import math
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from proxy.acceptance import accept_mask, arrival_times, resolve
from proxy.engine.batch_plan import BatchPlan
from proxy.engine.decision_stats import DecisionStats
from proxy.engine.drafts import DraftRows
from proxy.engine.rows import ProxiedRows
from proxy.noise import draw_noise


class Step(NamedTuple):
    """What the worker knows about the current step and vLLM does not pass to its sampler."""

    plan: BatchPlan
    hidden: Tensor  # [R, H], the lm_head's input; row by row those of the logits
    positions: Tensor  # [R or more] int, index of the token to be drawn
    discarded: Tensor | None  # [R] bool, rows of unfinished prefills; None = no row
    stats: DecisionStats
    draft_rows: DraftRows | None = None  # None = nothing was drafted: each row is a request


def sample_proxied_rows(
    step: Step,
    logits: Tensor,  # [R, V], constraints and penalties applied
    *,
    temperature_applied: bool,  # the logits are divided by `plan.divisors`
    drafts: Tensor | None = None,  # [R] int, drafted for the rows' positions; -1 = none
) -> Tensor:
    """The tokens of the rows that have a proxy: [A] int64."""
    rows, start = step.plan.proxied, perf_counter()
    assert rows is not None
    decision, scored = rows.decide(
        logits, step.hidden, step.positions, temperature_applied=temperature_applied
    )
    discarded = step.discarded
    if step.draft_rows is not None and drafts is not None:
        tokens = step.plan.new_tokens(decision.token_ids)
        rejected = step.draft_rows.is_rejected(tokens, drafts)
        discarded = rejected if discarded is None else discarded | rejected
    if discarded is not None:
        discarded = rows.select_rows(discarded)
    step.stats.record(rows, decision, discarded, scored)
    step.stats.record_seconds(perf_counter() - start)
    return decision.token_ids


def score_shadows(
    step: Step,
    logits: Tensor,  # [R, V]
    sampled: Tensor,  # [R] int64, the emitted tokens; -1 = none
    *,
    temperature_applied: bool,  # the logits are divided by `plan.divisors`
) -> None:
    """Count for the metrics what each shadow proxy would have made of the emitted tokens.

    A shadow scores the emitted token first, then the other candidates in the order of sampling. It
    decides otherwise where it rejects the emitted token and ends with another one.
    """
    divisors = step.plan.divisors if temperature_applied else None
    for rows in step.plan.shadows:
        emitted = rows.select_rows(sampled)
        scored, changed = _shadow_decisions(rows, step.hidden, logits, emitted, divisors)
        if step.discarded is not None:
            scored = scored & ~rows.select_rows(step.discarded)
        step.stats.record_shadow(rows.proxies[0], scored, changed)


def _shadow_decisions(
    rows: ProxiedRows,  # of one shadow
    hidden: Tensor,  # [R, H]
    logits: Tensor,  # [R, V]
    emitted: Tensor,  # [A] int64
    divisors: Tensor | None,  # [R], what the logits are divided by already
) -> tuple[Tensor, Tensor]:
    """Whether the emitted token is among the shadow's candidates, and whether it ends with another: [A] bool."""
    settings = rows.settings
    temperature = settings.temperature
    if divisors is not None:
        undone = 1 / rows.select_rows(divisors)
        temperature = undone if temperature is None else temperature * undone
    candidates = rows.candidates(logits, temperature)
    accept_logits = rows.accept_logits(hidden, candidates)
    num_rows, num_slots = candidates.token_ids.shape
    race_noise, accept_noise = draw_noise(num_rows, num_slots, logits.device).unbind(1)
    is_inside = candidates.logprobs > -math.inf
    is_emitted = is_inside & (candidates.token_ids == emitted.unsqueeze(-1))  # [A, K]
    times = arrival_times(
        candidates, race_noise, sharpness=settings.sharpness, greedy=settings.greedy
    )
    accepts = accept_mask(
        candidates,
        accept_logits,
        accept_noise,
        strength=None,
        max_rejections=settings.max_rejections,
        greedy=settings.greedy,
    )
    emitted_first = times.masked_fill(is_emitted, -math.inf)
    decision = resolve(candidates, emitted_first, accepts, settings.max_rejections)
    return is_emitted.any(-1), decision.token_ids != emitted
