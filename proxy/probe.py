"""The probe: a linear head on the frozen LLM's hidden states, which scores a whole response.

    r(x, y) = w · (1/T) Σ_t h_t

with h_t the hidden state after the LLM has read the t-th of the response's T tokens, the end of the turn included.
`training.reward_model --kind probe` fits w to preference pairs. `reward.json` beside the weights says which layer's
states are meant.
"""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from proxy.checkpoint import CheckpointError

PROBE_FILE = "probe.safetensors"
_MAX_BYTES = 2**24
_MAX_WEIGHT = 1e6  # times any hidden state it stays finite in float32


def save_weight(directory: Path, weight: Tensor) -> None:
    """Write w, [H]."""
    tensors = {"weight": weight.float().cpu().contiguous()}
    safetensors.torch.save_file(tensors, directory / PROBE_FILE)


def load_weight(directory: Path) -> Tensor:
    """w: [H] float32.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = directory / PROBE_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        weight = safetensors.torch.load_file(path)["weight"]
        if weight.dtype != torch.float32 or weight.dim() != 1:
            raise ValueError("its tensor is no vector of float32")
        if not (weight.abs() <= _MAX_WEIGHT).all():
            raise ValueError("it holds NaN, infinity or a number that is too large")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not the weights of a probe: {error}. Train it again, or copy it again."
        ) from None
    return weight
