"""How much likelier responses are with a proxy than without: a proxy as a reward or a judge.

    r(y) = Σ_t log π(y_t) / p(y_t)

over the positions that leave a choice, with π the distribution of `proxy.exact` at strength 1.
"""

import torch
from torch import Tensor

from proxy.acceptance import Candidates
from proxy.exact import emission_probabilities
from proxy.network import ProxyConfig, Weights, score_single
from proxy.positions import Positions

_ROWS = 512  # positions at once


@torch.inference_mode()
def log_ratios(
    weights: Weights, table: Tensor, config: ProxyConfig, positions: Positions
) -> Tensor:
    """r of N responses in nats: [N] float64, on the CPU.

    Args:
        weights: the proxy's, with P = 1.
        table: its candidate table, [V, 2W].
        config: its configuration.
        positions: of the responses, read with the nucleus of this configuration.
    """
    device = table.device
    parts = []
    for rows in torch.arange(len(positions.slots)).split(_ROWS):
        candidates = Candidates(
            positions.token_ids[rows].long().to(device), positions.logprobs[rows].to(device)
        )
        accept_logits = score_single(
            weights,
            positions.hidden[rows].to(device),
            table[candidates.token_ids],
            candidates.logprobs,
        )
        emitted = emission_probabilities(
            candidates, accept_logits, strength=1.0, max_rejections=config.max_rejections
        )
        slots = positions.slots[rows, None].to(device)
        probability, logprob = (
            x.double().gather(-1, slots).squeeze(-1) for x in (emitted, candidates.logprobs)
        )
        tiny = torch.finfo(torch.float32).tiny
        parts.append((probability.clamp(min=tiny).log() - logprob).cpu())
    owners = torch.arange(len(positions.counts)).repeat_interleave(positions.counts)
    sums = torch.zeros(len(positions.counts), dtype=torch.float64)
    return sums.index_add(0, owners, torch.cat(parts)) if parts else sums
