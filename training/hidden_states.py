"""The frozen LLM's hidden states of finished responses, in forwards of whole sequences."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.rollout import HeadInput

FORWARD_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""At once, padding included. A CPU is faster where what is between two layers stays in its cache."""


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    episodes: Tensor,  # [D] index of the response
    places: Tensor,  # [D] index of the token in the response
    *,
    forward_tokens: int | None = None,
) -> Tensor:
    """The lm_head's input where a response's token was drawn: [D, H].

    Args:
        forward_tokens: what goes through the LLM at once, at most; a longer sequence goes alone. None = as suits the
            device.
    """
    device = model.device
    most = forward_tokens or FORWARD_TOKENS.get(device.type, 2048)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = starts[episodes] + places - 1
    needed = torch.zeros_like(starts).scatter_reduce(0, episodes, positions + 1, "amax").tolist()
    rows = [(p + r)[:n] for p, r, n in zip(prompts, responses, needed, strict=True)]
    hidden_size = model.get_output_embeddings().weight.shape[-1]
    hidden = torch.empty(len(episodes), hidden_size, dtype=model.dtype, device=device)
    slots = torch.full((len(rows),), -1, device=device)
    with HeadInput(model) as head:
        for batch in _batches([len(row) for row in rows], most):
            width = max(len(rows[row]) for row in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for slot, row in enumerate(batch):  # padded on the right
                ids[slot, : len(rows[row])] = torch.tensor(rows[row])
                mask[slot, : len(rows[row])] = 1
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            slots.fill_(-1)
            slots[torch.tensor(batch, device=device)] = torch.arange(len(batch), device=device)
            own = torch.nonzero(slots[episodes] >= 0).squeeze(-1)
            hidden[own] = head.rows[slots[episodes[own]], positions[own]]
    return hidden


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of sequences that go together, the shortest first: padded, at most `most` tokens. No empty ones."""
    batch: list[int] = []
    for index in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
