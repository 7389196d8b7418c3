"""Several responses to one prompt as one sequence, so that a model reads the prompt once.

No response attends to another one, and the positions of each continue from the prompt.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

ALIKE = {torch.float32: 1e-3}
ALIKE_ROUNDED = 0.05
"""How much a packed sequence may differ: rounding. The second value is for weights with 8 or 11 bits."""


class Group(NamedTuple):
    """Token ids of responses to one prompt."""

    prompt: list[int]
    responses: Sequence[list[int]]

    @property
    def length(self) -> int:
        """Tokens of all."""
        return len(self.prompt) + sum(map(len, self.responses))


class Packed(NamedTuple):
    """A model's inputs [N, T], padded on the right, and which response of its group each token belongs to."""

    inputs: dict[str, Tensor]
    owners: Tensor  # [N, T]: from 1 on; 0 = the prompt, or padding


def pack(groups: Sequence[Group], *, additive: bool) -> Packed:
    """One sequence for each of N groups.

    Args:
        additive: use a mask that is added to the scores, as "eager" attention needs it.
    """
    ids = torch.zeros(len(groups), max(group.length for group in groups), dtype=torch.long)
    positions, owners = ids.clone(), ids.clone()
    for i, (prompt, responses) in enumerate(groups):
        start = end = len(prompt)
        ids[i, :start], positions[i, :start] = torch.tensor(prompt), torch.arange(start)
        for number, response in enumerate(responses, 1):
            begin, end = end, end + len(response)
            ids[i, begin:end] = torch.tensor(response, dtype=torch.long)
            positions[i, begin:end] = torch.arange(start, start + len(response))
            owners[i, begin:end] = number
    inputs = {"input_ids": ids}
    if any(len(group.responses) > 1 for group in groups):
        before = torch.ones(2 * ids.shape[1:], dtype=torch.bool).tril()
        seen = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
        mask = (before & seen).unsqueeze(1)
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        inputs |= {"position_ids": positions, "attention_mask": mask}
    return Packed(inputs, owners)


def needs_additive(model: PreTrainedModel) -> bool:
    """Whether its attention adds the mask to the scores."""
    return model.config.get_text_config()._attn_implementation == "eager"


def takes_packed(model: PreTrainedModel, longest: int) -> bool:
    """Whether it takes positions, and attends to all of `longest` tokens.

    That is necessary and not enough: compare what it makes of a packed sequence, up to `ALIKE`.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    return takes_positions and (window is None or longest <= window)
