"""Log-probabilities of single tokens without all logits: with a vocabulary of 150,000 these would be the largest
tensor.

The head is applied to a slice of positions at a time, and again in the backward pass instead of keeping its output.
What a model does to its logits after the head (a cap, a scale) is done here too: its own forward is called with the
hidden states in place of its body.
"""

import functools
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from training.adapters import CausalLM

CHUNK = 2**25
"""Logits computed at once; 128 MiB in float32."""


def add_logprobs(model: PreTrainedModel) -> None:
    """Make `model(..., places=…, targets=…)` return log p of M tokens, natural log: [M] in float32.

    `places` [M] are indices into the N · T positions of the input. `targets` [M] are the tokens after them; a position
    may have several. The model's forward itself is replaced, so that a model wrapped for several devices or with a LoRA
    supports it too. Without the two arguments the forward is unchanged.
    """
    whole_forward = model.forward

    @functools.wraps(whole_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        places: Tensor | None = None,
        targets: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if places is None or targets is None:
            return whole_forward(*args, **inputs)
        body: Any = self.base_model
        states = body(*args, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        return _logprobs(self, whole_forward, states.index_select(0, places), targets)

    model.forward = MethodType(forward, model)


def _logprobs(
    model: PreTrainedModel, whole_forward: Any, states: Tensor, targets: Tensor
) -> Tensor:
    rows = max(1, CHUNK // model.config.get_text_config().vocab_size)

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = _logits(model, whole_forward, states).float()
        return -F.cross_entropy(logits, targets, reduction="none")

    parts = list(zip(states.split(rows), targets.split(rows), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([chunk_logprobs(*part) for part in parts])
    return torch.cat([checkpoint(chunk_logprobs, *part, use_reentrant=False) for part in parts])


def response_logprobs(model: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """log π of the responses' tokens, 0 elsewhere, without the logits of other tokens and never with all logits at
    once.

    Args:
        ids: [N, T + 1], padded on the right: under a causal mask padding changes nothing before it
        mask: [N, T] bool, True = the token after the position belongs to the response

    Returns:
        [N, T] nats.
    """
    kept = mask.flatten().nonzero().squeeze(-1)
    places = kept + kept // mask.shape[1]  # the position before, in rows that are longer by one
    logprobs = model(input_ids=ids, places=places, targets=ids[:, 1:][mask])
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of all tokens but the first: [N, T + 1, V], [N, T + 1] -> [N, T], natural log."""
    return -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits from the output of the model's body: [M, H] -> [M, V]."""
    return _logits(model, model.forward, states)


def _logits(model: PreTrainedModel, whole_forward: Any, states: Tensor) -> Tensor:
    """As `logits_of`, with the forward to call."""
    name, body = model.base_model_prefix, model.base_model
    setattr(model, name, _Given(states.unsqueeze(0)))
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return whole_forward(input_ids=ids, use_cache=False).logits[0]
    finally:
        setattr(model, name, body)


class _Given(nn.Module):
    """A body whose output is given."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states  # [1, M, H]

    def forward(self, *args: Any, **inputs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states)
