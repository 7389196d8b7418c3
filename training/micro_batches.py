"""Gradient steps on batches that do not fit the memory at once: parts of a batch are computed one by one, and their
gradients are added.

The loss of a batch is a sum over its rows, so splitting it changes only rounding.
"""

import contextlib
import ctypes
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from training.console import TrainingError


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, in parts of at most `max_tokens` with padding, or of one sequence; the longest first."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _give_back() -> None:
    """Have glibc return the free memory of its heap: parts of different lengths fragment it more and more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


class MicroBatchTrainer(Trainer):
    """transformers' trainer, for batches in parts."""

    max_tokens: int
    """Tokens at once, including padding."""

    def __init__(self, *args: Any, max_tokens: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.max_tokens = max_tokens
        if self.args.n_gpu > 1:
            raise TrainingError(
                f"{self.args.n_gpu} GPUs are visible: start with `accelerate launch -m`, or name one in "
                "CUDA_VISIBLE_DEVICES"
            )

    @abstractmethod
    def parts(self, inputs: Any) -> list[Any]:
        """Split a batch into parts that each fit the memory."""

    @abstractmethod
    def part_loss(self, model: Any, part: Any) -> Tensor:
        """A part's contribution to the loss of its batch."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The batch's loss; gradients of all devices are reduced once, after the last part."""
        model.train()
        parts, total = self.parts(inputs), torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, 1):
            is_partial = number < len(parts)
            with self.accelerator.no_sync(model) if is_partial else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    loss = self.part_loss(model, part)
                self.accelerator.backward(loss)
            total += loss.detach()
            _give_back()
        return total

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The batch's loss only."""
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self.part_loss(model, part) for part in self.parts(inputs)]
        return torch.stack(losses).sum(), None, None
