"""The formulas of PPO (Schulman et al., arXiv 1707.06347), as pure functions.

The proxy's MDP has its reward at the end of the response and no discount. With λ = 1 the generalised advantage estimate
(arXiv 1506.02438) of every decision is R − V(s): the response's reward minus the value of the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def action_logprobs(accept_logits: Tensor, accepted: Tensor) -> Tensor:
    """log P(action): log a if the candidate was accepted, log(1 − a) if not; a = sigmoid(accept logit). [D]"""
    return torch.where(accepted, F.logsigmoid(accept_logits), F.logsigmoid(-accept_logits))


def action_entropy(accept_logits: Tensor) -> Tensor:
    """Entropy of the accept/reject action, in nats. [D]"""
    a = torch.sigmoid(accept_logits)
    return -(a * F.logsigmoid(accept_logits) + (1 - a) * F.logsigmoid(-accept_logits))


def whiten(x: Tensor) -> Tensor:
    """Scale to mean 0 and standard deviation 1; equal values become 0."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Generalised advantage estimates (arXiv 1506.02438), undiscounted: A_t = Σ_k λ^k (r_{t+k} + V_{t+k+1} − V_{t+k}).

    Args:
        rewards: [N, T]
        values: [N, T], of the states before the actions
        mask: [N, T], True = an action; each row's are one run, and the value after its last is 0
        lam: λ
    """
    advantages = torch.zeros_like(rewards)
    following, after = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + after - values[:, t] + lam * following
        following = torch.where(mask[:, t], advantage, 0.0)
        after = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages


def policy_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate loss, to be averaged and minimised: −min(ρA, clip(ρ, 1 ± ε) A), ρ = exp(log ratio). [D]"""
    ratios = log_ratios.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
