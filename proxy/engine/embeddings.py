"""Candidate tables from the LLM's embeddings, whichever tensor-parallel ranks hold these."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

from proxy.network import ProxyNetwork

_CHUNK = 8192  # tokens embedded at once


def embedding_chunks(model: nn.Module, vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """The LLM's embedding rows in chunks [<= 8192, H]; every rank has to ask for all of them."""
    with _without_lora(model):
        for start in range(0, vocab_size, _CHUNK):
            stop = min(start + _CHUNK, vocab_size)
            yield model.embed_input_ids(torch.arange(start, stop, device=device))  # type: ignore[operator]


def candidate_table(network: ProxyNetwork, chunks: Iterator[Tensor]) -> Tensor:
    """The candidate table [V, 2 width].

    An error is raised after the last chunk: the other ranks wait for this one at every chunk.
    """
    parts: list[Tensor] = []
    failure: Exception | None = None
    for rows in chunks:
        try:
            if failure is None:
                parts.append(network.candidate_table(rows))
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure
    return torch.cat(parts)


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """Embeddings without LoRA: vLLM's layer looks up adapters by the rows of the last batch."""
    layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbeddingWithLoRA)]
    for layer in layers:
        layer.forward = layer.base_layer.forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
