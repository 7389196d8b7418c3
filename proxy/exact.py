"""Accept/reject sampling in closed form: the probability of each token, where `acceptance` draws one.

Candidate i has rate q_i = p_i^(T0 / T) in the race. It is emitted if it is accepted (probability
a_i^β) and, at its arrival time t, every other candidate either has not arrived yet or has arrived and
was rejected, fewer than M of the latter:

    P(i) = a_i^β ∫ q_i e^(−q_i t) Σ_{m<M} [z^m] Π_{j≠i} (e^(−q_j t) + (1 − a_j^β)(1 − e^(−q_j t)) z) dt

The rest of the probability is that nothing is accepted; it goes to the most probable candidate. With
t = e^y the integrand decays doubly exponentially on both sides, where the trapezoidal rule converges
exponentially fast.

Everything is differentiable in the accept logits: a proxy is trained on it directly
(`training.proxy_dpo`).
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import Candidates, greedy_slots


class Grid(NamedTuple):
    """Where the integrand is evaluated: y = log t from `start` on, with the largest rate scaled to 1."""

    start: float  # an arrival before it has a probability below K e^start
    step: float
    dtype: torch.dtype


EXACT = Grid(-17.0, 0.5, torch.float64)
"""Error below 1e-7."""
TRAINING = Grid(-9.0, 0.8, torch.float32)
"""Error below 5e-4, at a quarter of the cost."""
_PAST_LAST = 4.0  # the slowest candidate arrives later with probability exp(-e^4) = 2e-24
# Between log rates: of two candidates so far apart the slower arrives first with probability e^-40 = 4e-18.
_WIDEST_GAP = 40.0


def emission_probabilities(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    *,
    strength: float,
    max_rejections: int,
    sharpness: float = 1.0,  # T0 / T, inf = greedy
    grid: Grid = EXACT,
) -> Tensor:
    """P(token of each slot is emitted): [R, K] of the grid's dtype, rows sum to 1."""
    logprobs = candidates.logprobs.to(grid.dtype)
    inside = logprobs > -math.inf
    size = inside.sum(-1, keepdim=True)
    cost = torch.where(size == 1, 0.0, strength * F.softplus(-accept_logits.to(grid.dtype)))
    if math.isinf(sharpness):
        limits = torch.full((len(cost),), max_rejections, device=cost.device)
        slots = greedy_slots(candidates, cost, limits)
        return F.one_hot(slots, cost.shape[-1]).to(grid.dtype)
    rates = _rates(logprobs * sharpness)
    accept = (-cost).exp() * inside
    # With no more than M candidates the limit never applies, and the sum over m is a product.
    is_limited = size.squeeze(-1) > max_rejections
    unforced = torch.zeros_like(rates)
    for rows, probabilities in (
        (~is_limited, _unlimited),
        (is_limited, partial(_limited, max_rejections=max_rejections)),
    ):
        if rows.any():
            values = probabilities(rates[rows], accept[rows], grid)
            unforced = unforced.index_put((rows,), values)
    unforced = torch.where(size == 1, inside.to(grid.dtype), unforced)
    forced = (1 - unforced.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((unforced[:, :1] + forced, unforced[:, 1:]), -1)


def sharpened(candidates: Candidates, sharpness: float) -> Candidates:
    """The frozen LLM's distribution at another temperature above 0: p^sharpness, renormalised over the nucleus."""
    return candidates._replace(logprobs=(candidates.logprobs * sharpness).log_softmax(-1))


def _rates(logs: Tensor) -> Tensor:
    """Log rates [R, K], the largest first, as rates: the largest is 1, and gaps are bounded.

    Beyond the bound the order of arrival is practically certain, and the grid need not reach further.
    """
    gaps = -logs.diff(dim=-1, prepend=logs[:, :1])
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)  # outside the nucleus
    near = torch.where(gaps.isinf(), math.inf, gaps.clamp(max=_WIDEST_GAP))
    return (-near.cumsum(-1)).exp()


def _race(rates: Tensor, accept: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """At each of G times: P(not arrived), P(arrived and rejected), density of arrival × dt; [G, R, K] each."""
    slowest = rates[rates > 0].min().item()
    end = _PAST_LAST - math.log(slowest)
    logs = torch.arange(
        grid.start, end + grid.step, grid.step, dtype=rates.dtype, device=rates.device
    )
    scaled = rates * logs.exp()[:, None, None]
    later = (-scaled).exp()
    return later, (1 - accept) * -torch.expm1(-scaled), scaled * later * grid.step


def _unlimited(rates: Tensor, accept: Tensor, grid: Grid) -> Tensor:
    later, rejected, arrival = _race(rates, accept, grid)
    logs = (later + rejected).clamp(min=torch.finfo(rates.dtype).tiny).log()
    others = (logs.sum(-1, keepdim=True) - logs).exp()
    return accept * (arrival * others).sum(0)


def _limited(rates: Tensor, accept: Tensor, grid: Grid, max_rejections: int) -> Tensor:
    later, rejected, arrival = _race(rates, accept, grid)
    num_slots = rates.shape[-1]

    def with_next(ways: Tensor, slot: int) -> Tensor:
        shifted = F.pad(ways, (1, -1))
        return ways * later[..., slot, None] + shifted * rejected[..., slot, None]

    # [..., m] = P(m < M of the slots before, or behind, were rejected so far, and none of them was accepted)
    none = F.one_hot(later.new_zeros(later.shape[:2], dtype=torch.long), max(1, max_rejections))
    before, behind = [none.to(rates.dtype)], [none.to(rates.dtype)]
    for slot in range(num_slots - 1):
        before.append(with_next(before[-1], slot))
        behind.append(with_next(behind[-1], num_slots - 1 - slot))
    result = [
        # m before it, and fewer than M - m behind it
        (arrival[..., slot] * (one * other.cumsum(-1).flip(-1)).sum(-1)).sum(0)
        for slot, (one, other) in enumerate(zip(before, reversed(behind), strict=True))
    ]
    return accept * torch.stack(result, -1) * (max_rejections > 0)


def divergence(probabilities: Tensor, candidates: Candidates) -> Tensor:
    """KL(proxied ‖ frozen) of each row in nats: [R]. `candidates` are what the frozen LLM draws from."""
    logprobs = candidates.logprobs.to(probabilities.dtype)
    # Not infinite outside the nucleus, where 0 · ∞ would be the gradient.
    logprobs = logprobs.masked_fill(logprobs == -math.inf, 0.0)
    logs = probabilities.clamp(min=torch.finfo(logprobs.dtype).tiny).log() - logprobs
    return (probabilities * logs).sum(-1)
