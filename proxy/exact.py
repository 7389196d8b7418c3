"""The law in closed form: the probability of each token, where `acceptance` draws one.

Candidate i rings at rate q_i = p_i^(T0 / T). It is emitted if its coin came up (probability a_i^β) and, at the moment t
it rings, every other candidate either has not rung yet or has rung and been rejected, fewer than M of the latter:

    P(i) = a_i^β ∫ q_i e^(−q_i t) Σ_{m<M} [z^m] Π_{j≠i} (e^(−q_j t) + (1 − a_j^β)(1 − e^(−q_j t)) z) dt

What is left is the probability that nothing was accepted, and belongs to the most probable candidate. With t = e^y
the integrand falls off doubly exponentially on both sides, where the trapezoidal rule converges exponentially fast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import Candidates, greedy_slots

# y = log t, where the fastest clock's rate is 1: the first rings before _START with probability K e^-17 = 4e-8 K.
_START, _STEP = -17.0, 0.5
_PAST_LAST = 4.0  # the slowest clock has not rung by then with probability exp(-e^4) = 2e-24
# Between log rates: of two clocks so far apart the slower rings first with probability e^-40 = 4e-18.
_WIDEST_GAP = 40.0


def emission_probabilities(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    *,
    strength: float,
    max_rejections: int,
    sharpness: float = 1.0,  # T0 / T, inf = greedy
) -> Tensor:
    """P(token of each slot is emitted): [R, K] float64, rows sum to 1."""
    logprobs = candidates.logprobs.double()
    inside = logprobs > -math.inf
    size = inside.sum(-1, keepdim=True)
    cost = torch.where(size == 1, 0.0, strength * F.softplus(-accept_logits.double()))
    if math.isinf(sharpness):
        limits = torch.full((len(cost),), max_rejections, device=cost.device)
        slots = greedy_slots(candidates, cost, limits)
        return F.one_hot(slots, cost.shape[-1]).double()
    rates = _rates(logprobs * sharpness)
    accept = (-cost).exp() * inside
    # Where all others together are fewer than M, how many were rejected does not matter: the sum is a product.
    is_limited = size.squeeze(-1) > max_rejections
    unforced = torch.empty_like(rates)
    unforced[~is_limited] = _unlimited(rates[~is_limited], accept[~is_limited])
    unforced[is_limited] = _limited(rates[is_limited], accept[is_limited], max_rejections)
    probabilities = torch.where(size == 1, inside.double(), unforced)
    probabilities[:, 0] += (1 - probabilities.sum(-1)).clamp(min=0)
    return probabilities


def sharpened(candidates: Candidates, sharpness: float) -> Candidates:
    """What the LLM alone draws from at another temperature above 0: p^sharpness, renormalised over the nucleus."""
    return candidates._replace(logprobs=(candidates.logprobs * sharpness).log_softmax(-1))


def _rates(logs: Tensor) -> Tensor:
    """Log rates [R, K], the largest first, as rates; the largest is 1, and none is far below the one before it.

    Far apart, the order is as good as certain, however far: so the grid need not reach further.
    """
    gaps = -logs.diff(dim=-1, prepend=logs[:, :1])
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)  # outside the nucleus
    near = torch.where(gaps.isinf(), math.inf, gaps.clamp(max=_WIDEST_GAP))
    return (-near.cumsum(-1)).exp()


def _clocks(rates: Tensor, accept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At each of G times: P(not rung yet), P(rung and rejected), density of ringing × dt; [G, R, K] each."""
    slowest = rates[rates > 0].min().item() if rates.numel() else 1.0
    end = _PAST_LAST - math.log(slowest)
    grid = torch.arange(_START, end + _STEP, _STEP, dtype=torch.float64, device=rates.device)
    scaled = rates * grid.exp()[:, None, None]
    later = (-scaled).exp()
    return later, (1 - accept) * -torch.expm1(-scaled), scaled * later * _STEP


def _unlimited(rates: Tensor, accept: Tensor) -> Tensor:
    later, rejected, ring = _clocks(rates, accept)
    logs = (later + rejected).clamp(min=1e-300).log()
    others = (logs.sum(-1, keepdim=True) - logs).exp()
    return accept * (ring * others).sum(0)


def _limited(rates: Tensor, accept: Tensor, max_rejections: int) -> Tensor:
    later, rejected, ring = _clocks(rates, accept)
    result = torch.zeros_like(rates)
    for i in range(rates.shape[-1]):
        # ways[..., m] = P(m others rejected so far, none accepted), m < M
        ways = rates.new_zeros(*later.shape[:2], max_rejections)
        ways[..., :1] = 1
        for j in range(rates.shape[-1]):
            if j != i:
                shifted = F.pad(ways, (1, 0))[..., :-1]
                ways = ways * later[..., j, None] + shifted * rejected[..., j, None]
        result[:, i] = accept[:, i] * (ring[..., i] * ways.sum(-1)).sum(0)
    return result


def divergence(probabilities: Tensor, candidates: Candidates) -> Tensor:
    """KL(proxied ‖ frozen) of each row in nats: [R]. `candidates` are what the frozen LLM draws from."""
    logs = probabilities.clamp(min=1e-300).log() - candidates.logprobs.double()
    return torch.where(probabilities > 0, probabilities * logs, 0.0).sum(-1)
