"""Mean hidden states of given responses: what a probe (`proxy.probe`) scores.

The state of a token is the one after the LLM has read it. The last layer's states are what the LLM's head reads, and
thus what the server's worker sees; those of other layers are transformers' `hidden_states`.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.micro_batches import split_by_tokens
from training.model_inputs import HeadInput
from training.packing import ALIKE, ALIKE_ROUNDED, Group, needs_additive, pack, takes_packed
from training.positions import Response

_TRIED = 32  # tokens
_MOST_PACKED = 2048  # tokens of a sequence, whose mask is their square


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
    """One pass of the frozen LLM over N responses; the prompt of several is read once where that changes nothing but
    rounding. The mean of an empty response is 0.

    Args:
        responses: N of them.
        layers: L numbers from 1 to the LLM's number of layers.
        model: the frozen LLM, from `training.models.load_model`.
        max_tokens: in one batch, padding included; a longer response is read alone.
    """
    groups, places = _grouped(responses, min(max_tokens, _MOST_PACKED))
    shared = max(groups, key=lambda group: len(group.responses))
    longest = max(response.length for response in responses)
    if len(shared.responses) > 1 and not (
        takes_packed(model, longest) and _is_alike(shared, layers, model)
    ):
        groups, places = _grouped(responses, 0)
    batches = split_by_tokens([group.length for group in groups], max_tokens)
    means = [_read_batch([groups[i] for i in batch], layers, model) for batch in batches]
    order = torch.tensor([place for batch in batches for i in batch for place in places[i]])
    lengths = torch.tensor([len(response.response) for response in responses])
    return MeanStates(torch.cat(means)[order.argsort()], lengths)


def _grouped(responses: Sequence[Response], max_tokens: int) -> tuple[list[Group], list[list[int]]]:
    """Responses to one prompt as groups of at most `max_tokens` tokens, or of one; and the indices of each group's."""
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, response in enumerate(responses):
        by_prompt[tuple(response.prompt)].append(i)
    places: list[list[int]] = []
    for prompt, owned in by_prompt.items():
        left = -1
        for i in owned:
            length = len(responses[i].response)
            if length > left:
                places.append([])
                left = max_tokens - len(prompt)
            places[-1].append(i)
            left -= length
    groups = [
        Group(responses[first].prompt, [responses[i].response for i in (first, *others)])
        for first, *others in places
    ]
    return groups, places


def _is_alike(group: Group, layers: Sequence[int], model: PreTrainedModel) -> bool:
    """Whether the starts of two responses have the same means packed as alone."""
    prompt = group.prompt[-_TRIED:]
    starts = [response[:_TRIED] for response in group.responses[:2]]
    packed = _read_batch([Group(prompt, starts)], layers, model)
    alone = _read_batch([Group(prompt, [start]) for start in starts], layers, model)
    tolerance = ALIKE.get(model.dtype, ALIKE_ROUNDED)
    return bool((packed - alone).norm() <= tolerance * alone.norm())


def _read_batch(groups: Sequence[Group], layers: Sequence[int], model: PreTrainedModel) -> Tensor:
    """[R, L, H] of all groups' responses, on the CPU."""
    last = num_layers_of(model)
    packed = pack(groups, additive=needs_additive(model))
    with HeadInput(model, logits_of_last=True) as head:
        output = model(
            **{name: tensor.to(model.device) for name, tensor in packed.inputs.items()},
            use_cache=False,
            output_hidden_states=any(i < last for i in layers),
        )
    counts = torch.tensor([len(group.responses) for group in groups])
    is_response = packed.owners > 0
    owners = (packed.owners + (counts.cumsum(0) - counts)[:, None] - 1)[is_response]
    lengths = torch.bincount(owners, minlength=int(counts.sum())).clamp(min=1)
    places, owners = is_response.to(model.device), owners.to(model.device)
    means = []
    for layer in layers:
        states = head.states if layer == last else output.hidden_states[layer]
        rows = states[places].float()
        sums = rows.new_zeros(len(lengths), rows.shape[-1]).index_add(0, owners, rows)
        means.append(sums.cpu() / lengths[:, None])
    return torch.stack(means, 1)
