"""Losses on preferences, computed on the distribution that a proxy's accept/reject sampling emits (`proxy.exact`).

With π the probability of a token under the proxy and p under the frozen LLM, both within the nucleus, a response y has

    r(y) = Σ_t log π(y_t) / p(y_t)

over the positions that leave a choice. The losses are those of full fine-tuning, with π as the policy and p as the
reference: DPO (arXiv 2305.18290), IPO (2310.12036), KTO (2402.01306), and SimPO (2405.14734), which has no reference.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy.acceptance import Candidates
from proxy.exact import TRAINING, divergence, emission_probabilities
from proxy.network import ProxyNetwork
from proxy.positions import Positions

Loss = Literal["dpo", "ipo", "kto", "simpo"]

_WIDTHS = (4, 8)  # nuclei up to these sizes are computed together; larger ones are padded to K
SIMPO_MARGIN = 0.5  # γ / β in the paper's notation


class Scores(NamedTuple):
    """Sums over the positions of each of N responses."""

    log_ratio: Tensor  # [N] nats, r(y)
    logprob: Tensor  # [N] nats, Σ_t log π(y_t)
    kl: Tensor  # [N] nats, Σ_t KL(π ‖ p)
    caution: Tensor  # [N], Σ_t (log of the largest accept probability)²
    tokens: Tensor  # [N] tokens of the whole response


def score(
    network: ProxyNetwork, embeddings: Tensor, positions: Positions, owners: Tensor
) -> Scores:
    """Score N responses with the proxy.

    Args:
        network: the proxy.
        embeddings: the LLM's input embeddings, [V, H].
        positions: P positions of the N responses.
        owners: [P] index of the response of each position.
    """
    device = embeddings.device
    count = len(positions.counts)
    token_ids, where = positions.token_ids.to(device).long().unique(return_inverse=True)
    table = network.candidate_table(embeddings[token_ids])
    candidates = Candidates(where, positions.logprobs.to(device))
    slots, owners = positions.slots.to(device)[:, None], owners.to(device)
    sizes = (candidates.logprobs > -torch.inf).sum(-1)
    hidden = positions.hidden.to(device)
    # The second term gives responses without a choice a gradient, of 0.
    sums = embeddings.new_zeros(4, count, dtype=torch.float32) + 0 * table.sum()
    num_candidates = candidates.logprobs.shape[-1]
    previous_width = 1
    for width in (*(w for w in _WIDTHS if w < num_candidates), num_candidates):
        rows = ((sizes > previous_width) & (sizes <= width)).nonzero().squeeze(-1)
        previous_width = width
        if not len(rows):
            continue
        subset = Candidates(*(tensor[rows, :width] for tensor in candidates))
        accept_logits = network(hidden[rows], table[subset.token_ids], subset.logprobs)
        emitted = emission_probabilities(
            subset,
            accept_logits,
            strength=1.0,
            max_rejections=network.config.max_rejections,
            grid=TRAINING,
        )
        tiny = torch.finfo(emitted.dtype).tiny
        logprob = emitted.gather(-1, slots[rows]).squeeze(-1).clamp(min=tiny).log()
        log_ratio = logprob - subset.logprobs.gather(-1, slots[rows]).squeeze(-1)
        is_inside = subset.logprobs > -torch.inf
        caution = F.logsigmoid(accept_logits).masked_fill(~is_inside, -torch.inf).amax(-1).square()
        of_rows = torch.stack((log_ratio, logprob, divergence(emitted, subset), caution))
        sums = sums.index_add(1, owners[rows], of_rows)
    log_ratio, logprob, kl, caution = sums
    return Scores(log_ratio, logprob, kl, caution, positions.tokens.to(device))


def pair_losses(better: Scores, worse: Scores, *, loss: Loss, beta: float) -> Tensor:
    """Losses of N pairs: [N]."""
    margins = better.log_ratio - worse.log_ratio
    if loss == "dpo":
        return -F.logsigmoid(beta * margins)
    if loss == "ipo":
        return (margins - 1 / (2 * beta)).square()
    if loss == "simpo":
        per_token = better.logprob / better.tokens - worse.logprob / worse.tokens
        return -F.logsigmoid(beta * per_token - SIMPO_MARGIN)
    raise ValueError(f"{loss} is of single verdicts")


def verdict_losses(scores: Scores, is_good: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """KTO's losses of N responses, each with a good or bad verdict, with weights of 1: [N].

    Args:
        scores: of the responses.
        is_good: [N] bool.
        reference: KL(π ‖ p) in nats a response: the log-ratio of a response if nothing was learned.
        beta: a higher one stays nearer to the frozen LLM.
    """
    signs = torch.where(is_good, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * signs * (scores.log_ratio - reference))


def preference_losses(margins: Tensor, certainty: Tensor, loss: str, beta: float) -> Tensor:
    """For each pair, p · L(Δ) + (1 − p) · L(−Δ), from Δ in nats and p = `certainty`: [N], [N] -> [N].

    L is −log σ(β Δ) for sigmoid, max(0, 1 − β Δ) for hinge, (Δ − 1 / 2β)² for ipo.
    """

    def one_sided(deltas: Tensor) -> Tensor:
        if loss == "sigmoid":
            return -F.logsigmoid(beta * deltas)
        if loss == "hinge":
            return (1 - beta * deltas).clamp(min=0)
        return (deltas - 1 / (2 * beta)).square()

    return certainty * one_sided(margins) + (1 - certainty) * one_sided(-margins)
