"""Batches of token ids as a model's inputs, and a hook on what its head reads."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.console import TrainingError


def pad_left(rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids as a model's inputs, padded on the left: `input_ids`, `attention_mask`, `position_ids`, each [N, T]."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, device=device)
        mask[i, width - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def pad_responses(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt and response of each sequence, padded on the right: ids [N, T], and a mask of the response's tokens, [N,
    T] bool.

    Under a causal mask padding changes nothing before it: a model needs no other inputs.
    """
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=device)
    is_response = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row, device=device)
        is_response[i, len(prompt) : len(row)] = True
    return ids, is_response


class HeadInput:
    """Records the input of the lm_head, independent of what the architecture does to the logits afterwards."""

    def __init__(self, model: PreTrainedModel, *, logits_of_last: bool = False) -> None:
        """
        Args:
            model: with a head and a key-value cache.
            logits_of_last: compute the last position's logits only, while the input is recorded for all positions; the
                logits of all positions would be by far the largest tensor.

        Raises:
            TrainingError: it lacks one of the two.
        """
        self._logits_of_last = logits_of_last
        self._head = model.get_output_embeddings()
        has_cache = "past_key_values" in inspect.signature(model.forward).parameters
        if self._head is None or not has_cache:
            missing = "key-value cache" if self._head is not None else "output embeddings"
            raise TrainingError(f"{type(model).__name__} has no {missing}: a proxy needs both")

    def __enter__(self) -> "HeadInput":
        self._handle = self._head.register_forward_pre_hook(self._tap)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _tap(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # With strided rows torch would compute a batched product, with a copy of the head's weights for each row.
        self.states = inputs[0].contiguous()  # [N, T, H]
        return (self.states[:, -1:].contiguous() if self._logits_of_last else self.states,)

    @property
    def rows(self) -> Tensor:
        """The input at the last position: [N, H]."""
        return self.states[:, -1]
