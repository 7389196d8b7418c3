"""Counts the bytes of the tensors that are made while it is on."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """`peak` is the most that tensors made in here held at once; what an operation holds inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}  # storages, by id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._record((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._record(result, is_new=True)
        return result

    def _record(self, tree: Any, is_new: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, torch.Tensor) or id(leaf.untyped_storage()) in self._storages:
                continue
            storage = leaf.untyped_storage()
            key, size = id(storage), storage.nbytes() if is_new else 0

            def forget(_: Any, key: int = key, size: int = size) -> None:
                self.live -= size
                del self._storages[key]

            self._storages[key] = weakref.ref(storage, forget)
            self.live += size
            self.peak = max(self.peak, self.live)
