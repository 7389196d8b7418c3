"""Copies between host and device that never wait for the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(data: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host data as a tensor on the device; on an accelerator through pinned memory."""
    tensor = torch.tensor(data, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host: the copy is queued on the device, and nothing waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)  # pinned memory, if it comes from CUDA
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event is not None:
            self._event.record()

    def is_done(self) -> bool:
        """Whether `numpy` would return at once."""
        return self._event is None or self._event.query()

    def numpy(self) -> Any:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
