"""Mean hidden states of given responses: what a probe (`proxy.probe`) scores.

The state of a token is the one after the LLM has read it. The last layer's states are what the LLM's head reads, and
thus what the server's worker sees; those of other layers are transformers' `hidden_states`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.micro_batches import split_by_tokens
from training.model_inputs import HeadInput, pad_responses
from training.positions import Response


class MeanStates(NamedTuple):
    """Of N responses."""

    means: Tensor  # [N, L, H] float32, of each of the layers
    lengths: Tensor  # [N] tokens


def num_layers_of(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


@torch.inference_mode()
def read_means(
    responses: Sequence[Response],
    layers: Sequence[int],
    *,
    model: PreTrainedModel,
    max_tokens: int,
) -> MeanStates:
    """One pass of the frozen LLM over N responses. The mean of an empty response is 0.

    Args:
        responses: N of them.
        layers: L numbers from 1 to the LLM's number of layers.
        model: the frozen LLM, from `training.models.load_model`.
        max_tokens: in one batch, padding included; a longer response is read alone.
    """
    batches = split_by_tokens([response.length for response in responses], max_tokens)
    parts = [_read_batch([responses[i] for i in batch], layers, model) for batch in batches]
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    lengths = torch.tensor([len(response.response) for response in responses])
    return MeanStates(torch.cat(parts)[order], lengths)


def _read_batch(
    responses: Sequence[Response], layers: Sequence[int], model: PreTrainedModel
) -> Tensor:
    """[N, L, H] on the CPU."""
    prompts, texts = ([*column] for column in zip(*responses, strict=True))
    ids, is_response = pad_responses(prompts, texts, model.device)
    last = num_layers_of(model)
    with HeadInput(model, logits_of_last=True) as head:
        output = model(
            input_ids=ids, use_cache=False, output_hidden_states=any(i < last for i in layers)
        )
    owners = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[is_response]
    lengths = is_response.sum(-1, keepdim=True).clamp(min=1)
    means = []
    for layer in layers:
        states = head.states if layer == last else output.hidden_states[layer]
        rows = states[is_response].float()
        sums = rows.new_zeros(len(ids), rows.shape[-1]).index_add(0, owners, rows)
        means.append((sums / lengths).cpu())
    return torch.stack(means, 1)
