"""What one pass of the frozen LLM over given texts yields, kept on disk in parts.

A part is named by a hash of LLM, data type, settings and its texts. So a resumed run continues with the next part, and
where texts are appended, such as those of another round, the earlier parts are not read again.
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
    """`directory/<hash>.safetensors`, each part complete or missing."""

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
        self._directory.mkdir(parents=True, exist_ok=True)
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        batches = [items[start : start + _PART] for start in range(0, len(items), _PART)]
        paths = [self._path(batch, settings) for batch in batches]
        parts = [_load(path, make) for path in paths]
        missing = [i for i, part in enumerate(parts) if part is None]
        total = sum(len(batches[i]) for i in missing)
        self._accelerator.wait_for_everyone()  # all processes have found the same parts
        with tqdm(total=total, unit="response", desc="hidden states", disable=index > 0) as bar:
            for number, i in enumerate(missing):
                if number % processes == index:
                    _save(paths[i], reader(batches[i]))
                bar.update(len(batches[i]))
        self._accelerator.wait_for_everyone()
        for i in missing:
            parts[i] = _load(paths[i], make)
        return [part for part in parts if part is not None]

    def _path(self, items: Sequence[ItemT], settings: Any) -> Path:
        digest = hashlib.sha256()
        for part in (*self._llm, settings, *items):
            digest.update(json.dumps(part).encode())
        return self._directory / f"{digest.hexdigest()[:16]}.safetensors"


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
