"""Prompts as the LLM reads them, and responses to them as rewards read them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from training.console import TrainingError
from training.conversations import Conversations
from training.data import Message, read_as
from training.machine import print_once
from training.rewards import Sample
from training.rollout import longest_prompt


class Prompt(NamedTuple):
    """A prompt as messages and as the LLM's token ids."""

    messages: list[Message]
    ids: list[int]


def read_prompts(
    source: str, options: Any, tokenizer: Any, config: PretrainedConfig, limit: int | None = None
) -> list[Prompt]:
    """Prompts that leave room for a response; others are left out and counted.

    Args:
        source: file or data set.
        options: `RowOptions` with `max_prompt_tokens` and `decoding`.
        tokenizer: the LLM's.
        config: the LLM's.
        limit: use only the first prompts, up to this number.

    Raises:
        TrainingError: as `training.data.read_as`, or no prompt leaves room.
    """
    chats = Conversations(tokenizer)
    max_tokens = min(options.max_prompt_tokens, longest_prompt(config, options.decoding))
    prompts = read_as(
        source,
        ("prompt",),
        options,
        lambda row: Prompt(row["prompt"], chats.prompt_ids(row["prompt"])),
        limit,
    )
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_tokens]
    if len(kept) < len(prompts):
        print_once(
            f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts of over {max_tokens} tokens"
        )
    if not kept:
        raise TrainingError(
            f"no prompt is within {max_tokens} tokens: --max-prompt-tokens, or the model's context"
        )
    return kept


def samples_of(
    tokenizer: Any, prompts: Sequence[Prompt], responses: Sequence[list[int]]
) -> list[Sample]:
    """The responses in the form that rewards take, each to the prompt at its index."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        Sample(prompt.messages, text, prompt.ids, response)
        for prompt, text, response in zip(prompts, texts, responses, strict=True)
    ]
