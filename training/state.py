"""A training run's state on disk, to resume a killed run: one safetensors file, replaced as a whole."""

import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from training.console import TrainingError

STATE_FILE = "training_state.safetensors"
_TEMPORARY = f".{STATE_FILE}"
STATE_FILES = (STATE_FILE, _TEMPORARY)
"""The files of a state, as `training.output` expects them."""


def save_state(
    directory: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    updates: int,
) -> None:
    """Write weights, optimiser state and the number of finished updates. A crash leaves the previous file."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in slots.items()}
    # Copies: the format refuses tied weights, which share memory.
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    metadata = {"updates": str(updates)}
    temporary = directory / _TEMPORARY
    with temporary.open("wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / STATE_FILE)


def load_state(directory: Path, network: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Restore a saved state; returns the number of finished updates, 0 without a state.

    Raises:
        TrainingError: the state is damaged.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        return 0
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        updates = int(metadata["updates"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); start anew with --overwrite") from None
    network.load_state_dict(_below("network.", tensors))
    slots: dict[int, dict[str, Any]] = {}
    for name, value in _below("optimiser.", tensors).items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": slots})
    return updates


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
