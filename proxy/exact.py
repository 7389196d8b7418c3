"""The law in closed form: the probability of each token, where `acceptance` draws one.

Candidate i rings at rate p_i. It is emitted if its coin came up (probability a_i^β) and, at the moment t it rings,
every other candidate either has not rung yet or has rung and been rejected, fewer than M of the latter:

    P(i) = a_i^β ∫ p_i e^(−p_i t) Σ_{m<M} [z^m] Π_{j≠i} (e^(−p_j t) + (1 − a_j^β)(1 − e^(−p_j t)) z) dt

What is left is the probability that nothing was accepted, and belongs to the most probable candidate. With t = e^y
the integrand falls off doubly exponentially on both sides, where the trapezoidal rule converges exponentially fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import Candidates

_GRID = torch.linspace(-14.0, 14.0, 57, dtype=torch.float64)  # y = log t, in steps of 1/2


def emission_probabilities(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    *,
    strength: float,
    max_rejections: int,
) -> Tensor:
    """P(token of each slot is emitted) for rows that sample: [R, K], rows sum to 1; not for greedy rows.

    Candidates less probable than about 1e-5 of their nucleus come out too small: their clocks ring after the grid ends.
    """
    p = candidates.logprobs.double().exp()
    inside = p > 0
    size = inside.sum(-1, keepdim=True)
    accept = (-strength * F.softplus(-accept_logits.double())).exp() * inside
    accept = torch.where(size == 1, inside.double(), accept)
    # Where all others together are fewer than M, how many were rejected does not matter: the sum is a product.
    is_limited = size.squeeze(-1) > max_rejections
    unforced = torch.empty_like(p)
    unforced[~is_limited] = _unlimited(p[~is_limited], accept[~is_limited])
    unforced[is_limited] = _limited(p[is_limited], accept[is_limited], max_rejections)
    probabilities = torch.where(size == 1, inside.double(), unforced)
    probabilities[:, 0] += (1 - probabilities.sum(-1)).clamp(min=0)
    return probabilities


def _clocks(p: Tensor, accept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At each of G times: P(not rung yet), P(rung and rejected), density of ringing × dt; [G, R, K] each."""
    time = _GRID.exp().to(p.device)[:, None, None]
    later = (-p * time).exp()
    return later, (1 - accept) * (1 - later), p * later * time * (_GRID[1] - _GRID[0])


def _unlimited(p: Tensor, accept: Tensor) -> Tensor:
    later, rejected, ring = _clocks(p, accept)
    logs = (later + rejected).clamp(min=1e-300).log()
    others = (logs.sum(-1, keepdim=True) - logs).exp()
    return accept * (ring * others).sum(0)


def _limited(p: Tensor, accept: Tensor, max_rejections: int) -> Tensor:
    later, rejected, ring = _clocks(p, accept)
    result = torch.zeros_like(p)
    for i in range(p.shape[-1]):
        # ways[..., m] = P(m others rejected so far, none accepted), m < M
        ways = p.new_zeros(*later.shape[:2], max_rejections)
        ways[..., :1] = 1
        for j in range(p.shape[-1]):
            if j != i:
                shifted = F.pad(ways, (1, 0))[..., :-1]
                ways = ways * later[..., j, None] + shifted * rejected[..., j, None]
        result[:, i] = accept[:, i] * (ring[..., i] * ways.sum(-1)).sum(0)
    return result


def divergence(probabilities: Tensor, candidates: Candidates) -> Tensor:
    """KL(proxied ‖ frozen) of each row in nats, the frozen LLM drawing from the same nucleus: [R]."""
    logs = probabilities.clamp(min=1e-300).log() - candidates.logprobs.double()
    return torch.where(probabilities > 0, probabilities * logs, 0.0).sum(-1)
