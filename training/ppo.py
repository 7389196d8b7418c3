"""The pieces of PPO (Schulman et al., arXiv 1707.06347) for a policy with two actions, as pure functions.

The MDP has its reward at the end of the response and no discount; with λ = 1 the generalised advantage estimate
(arXiv 1506.02438) of every decision is then R − V(s): the response's reward less the state's value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def action_logprobs(accept_logits: Tensor, accepted: Tensor) -> Tensor:
    """log P(action): log a where the candidate was accepted, log(1 − a) where not; a = sigmoid(accept logit). [D]"""
    return torch.where(accepted, F.logsigmoid(accept_logits), F.logsigmoid(-accept_logits))


def action_entropy(accept_logits: Tensor) -> Tensor:
    """Entropy of accept / reject, in nats. [D]"""
    a = torch.sigmoid(accept_logits)
    return -(a * F.logsigmoid(accept_logits) + (1 - a) * F.logsigmoid(-accept_logits))


def whiten(x: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1; all equal values become 0."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def policy_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate, to be minimised in the mean: −min(ρA, clip(ρ, 1 ± ε) A), ρ = exp(log ratio). [D]"""
    ratios = log_ratios.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
