"""Sizes of an LLM, and the formulas for memory and operations that follow from them.

N sequences at once, T tokens, L layers, H hidden, I feed-forward, V vocabulary, b bytes a number.
"""

from typing import NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from training.models import model_without_weights


class Sizes(NamedTuple):
    """The sizes of an LLM that determine memory and time."""

    parameters: int  # all, tied ones once
    linear: int  # weights of the linear layers but the head
    lora: int  # in + out, summed over these layers: a LoRA's parameters at rank 1
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads · size of a head
    key: int  # heads of keys · size of a head
    vocab: int


def sizes_of(model: str) -> Sizes:
    """Read from a config, and from a model of it without weights.

    Raises:
        TrainingError: there is no such config, or it is not of a transformer.
    """
    empty = model_without_weights(model)
    text, head = empty.config.get_text_config(), empty.get_output_embeddings()
    linear = [
        module.weight
        for module in empty.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        linear=sum(weight.numel() for weight in linear),
        lora=sum(sum(weight.shape) for weight in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * head_size,
        key=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocab=head.weight.shape[0],
    )


def forward_flops(sizes: Sizes, rows: int, tokens: int, seen: int, kept: int) -> int:
    """Multiplications and additions of a forward.

    Args:
        rows: sequences.
        tokens: read in this forward, of each sequence.
        seen: that a token may attend to, those of this forward included; computed in full, causal or not.
        kept: positions of each sequence whose logits are computed.
    """
    linear = 2 * sizes.linear * tokens
    attention = 4 * sizes.layers * sizes.query * tokens * seen
    return rows * (linear + attention + 2 * sizes.hidden * sizes.vocab * kept)


def cache_bytes(sizes: Sizes, rows: int, tokens: int, size: int) -> int:
    """Keys and values of all layers; a sliding window may keep fewer."""
    return 2 * sizes.layers * sizes.key * size * rows * tokens


def activation_bytes(sizes: Sizes, tokens: int, size: int) -> int:
    """Peak memory of a forward without gradients, in a gated feed-forward layer and fused attention."""
    return tokens * (3 * sizes.intermediate + 5 * sizes.hidden) * size


def float32_bytes(numbers: int, size: int) -> int:
    """Bytes of numbers, of their float32 copy if they are in bfloat16, and of one float32 result of the same size."""
    return numbers * (size + (4 if size < 4 else 0) + 4)


def decision_bytes(sizes: Sizes, decisions: int, size: int) -> int:
    """Recorded decisions: hidden state, token, log-probability, answer, episode."""
    return decisions * (sizes.hidden * size + 8 + 4 + 1 + 8)


def rollout_bytes(sizes: Sizes, rows: int, prompt: int, response: int, size: int) -> float:
    """The peak of sampling with transformers: keys and values, plus the prompts' activations or the logits."""
    cache = cache_bytes(sizes, rows, prompt + response, size)
    return cache + max(
        activation_bytes(sizes, rows * prompt, size), float32_bytes(rows * sizes.vocab, size)
    )
