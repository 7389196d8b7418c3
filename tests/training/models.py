"""Small random models of many architectures, saved with tokenizer and chat template as a hub repository has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from judge.messages import Message
from judge.prompts import LABELS
from proxy.checkpoint import identify
from training.base_model import CHAT_TEMPLATE, build_tokenizer
from training.models import end_ids, load_model
from training.policy import Decoding
from training.rewards import Frozen

WEIGHT_STD = 0.15  # spreads logits as widely as a trained model's
VOCAB_SIZE = 277  # of the tokenizer: odd, and smaller than any embedding

PROMPTS = ("Is my dog worth keeping?", "I have 30 pounds for my rose. Is that enough?", "Hi")
ANSWERS = ("Yes, a dog is a friend.", "No idea. Go away.", "Hello, what can I do for you?")

# As Gemma's own: no system role, and the roles take turns.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
_GEMMA = _SIZES | {"head_dim": 24}


class Architecture(NamedTuple):
    config: str  # transformers' class
    settings: dict[str, Any]
    chat_template: str = CHAT_TEMPLATE
    has_pad: bool = True  # whether the tokenizer has a padding token


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", _SIZES | {"vocab_size": 293}),
    "qwen2": Architecture("Qwen2Config", _SIZES | {"vocab_size": 320, "tie_word_embeddings": True}),
    "gemma": Architecture("GemmaConfig", _GEMMA | {"vocab_size": 281}, NO_SYSTEM),
    "gemma2": Architecture(
        "Gemma2Config",
        # Caps and window are low enough to matter.
        _GEMMA
        | {
            "vocab_size": 289,
            "sliding_window": 16,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 4.0,
        },
        NO_SYSTEM,
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {"vocab_size": 307, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024},
        has_pad=False,
    ),
}


def save_model(name: str, directory: Path) -> None:
    """Write model and tokenizer of an architecture into the directory."""
    architecture = ARCHITECTURES[name]
    # A judge's labels have to be one token each.
    tokenizer = build_tokenizer([*PROMPTS, *ANSWERS, *LABELS * 9] * 2, VOCAB_SIZE, context=1024)
    assert len(tokenizer) == VOCAB_SIZE
    tokenizer.chat_template = architecture.chat_template
    if not architecture.has_pad:
        tokenizer.pad_token = None
    model = random_model(architecture, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] > VOCAB_SIZE
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def frozen_of(directory: Path, decoding: Decoding | None = None, batch_size: int = 2) -> Frozen:
    """A saved model as rewards and judges take it."""
    model, tokenizer = load_model(str(directory))
    base, ends = identify(str(directory)), end_ids(model, tokenizer)
    return Frozen(model.eval(), tokenizer, base, decoding or Decoding(), ends, batch_size)


def random_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, biases and norms included."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(
        **architecture.settings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += WEIGHT_STD * torch.randn_like(parameter)
    return model.eval()


def chat(text: str, answer: str | None = None) -> list[Message]:
    """A conversation of one turn, or of two."""
    question = Message(role="user", content=text)
    return [question] if answer is None else [question, Message(role="assistant", content=answer)]


def data_rows(kind: str, count: int = 6) -> Sequence[dict[str, Any]]:
    """Rows of `sft`, `preferences` or `prompts` data."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt, good, bad = PROMPTS[i % 3], ANSWERS[i % 3], ANSWERS[(i + 1) % 3]
        rows.append(
            {
                "sft": {"messages": chat(prompt, good)},
                "prompts": {"prompt": chat(prompt)},
                "preferences": {
                    "prompt": chat(prompt),
                    "chosen": [{"role": "assistant", "content": good}],
                    "rejected": [{"role": "assistant", "content": bad}],
                },
            }[kind]
        )
    return rows


def length(prompts: list[Any], completions: list[str]) -> list[int]:
    """A reward."""
    return [len(text) for text in completions]
