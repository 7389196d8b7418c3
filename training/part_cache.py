"""What one pass of the frozen LLM over given texts yields, kept on disk in parts.

A directory is named by a hash of LLM, data type, settings and texts, so a resumed run continues with the next part, and
another run with the same four reads nothing again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors.torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from proxy.checkpoint import BaseModelId

_PART = 512  # items in a file


class Tensors(Protocol):
    """A named tuple of tensors."""

    def _asdict(self) -> dict[str, Tensor]: ...


ItemT = TypeVar("ItemT", bound=tuple[list[int], list[int]])
TensorsT = TypeVar("TensorsT", bound=Tensors)


class PartCache:
    """`directory/<hash>/<part>.safetensors`, each part complete or missing."""

    def __init__(
        self, directory: Path, base: BaseModelId, dtype: str, accelerator: Accelerator
    ) -> None:
        """
        Args:
            directory: where they are kept.
            base: the LLM.
            dtype: data type of the LLM.
            accelerator: of this run's processes, which share the work; each receives all parts.
        """
        self._directory, self._accelerator = directory, accelerator
        self._llm = base.fingerprint, dtype

    def parts(
        self,
        items: Sequence[ItemT],
        settings: Any,
        reader: Callable[[Sequence[ItemT]], TensorsT],
        make: Callable[..., TensorsT],
    ) -> list[TensorsT]:
        """What the reader yields for each part of the items, from disk or from the reader.

        Args:
            items: prompts and responses in token ids.
            settings: what else the result depends on, as JSON.
            reader: reads some of the items.
            make: the class of its result.
        """
        target = self._directory / self._key(items, settings)
        target.mkdir(parents=True, exist_ok=True)
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        starts = range(0, len(items), _PART)
        paths = [target / f"{i:05}.safetensors" for i in range(len(starts))]
        parts = [_load(path, make) for path in paths]
        missing = [i for i, part in enumerate(parts) if part is None]
        total = sum(len(items[starts[i] : starts[i] + _PART]) for i in missing)
        self._accelerator.wait_for_everyone()  # all processes have found the same parts
        with tqdm(total=total, unit="response", desc="hidden states", disable=index > 0) as bar:
            for number, i in enumerate(missing):
                batch = items[starts[i] : starts[i] + _PART]
                if number % processes == index:
                    _save(paths[i], reader(batch))
                bar.update(len(batch))
        self._accelerator.wait_for_everyone()
        for i in missing:
            parts[i] = _load(paths[i], make)
        return [part for part in parts if part is not None]

    def _key(self, items: Sequence[ItemT], settings: Any) -> str:
        digest = hashlib.sha256()
        for part in (*self._llm, settings, *items):
            digest.update(json.dumps(part).encode())
        return digest.hexdigest()[:16]


def _save(path: Path, part: Tensors) -> None:
    temporary = path.with_name(f".{path.name}")
    tensors = {name: tensor.contiguous() for name, tensor in part._asdict().items()}
    safetensors.torch.save_file(tensors, temporary)
    temporary.replace(path)


def _load(path: Path, make: Callable[..., TensorsT]) -> TensorsT | None:
    """None = missing or damaged."""
    try:
        return make(**safetensors.torch.load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None
