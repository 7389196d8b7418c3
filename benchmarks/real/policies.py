"""A method's policy in memory, and its answers."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.real.methods import METHODS, Method
from benchmarks.real.setting import DECODING, SYSTEM_PROMPT, TRAINED, Setting
from proxy.checkpoint import identify, load
from proxy.network import ProxyNetwork
from training.conversations import Conversations
from training.data import Message, read_rows
from training.models import end_ids, load_model
from training.policy import Decoding
from training.prompts import Prompt
from training.rewards import Frozen
from training.rollout_backends import RolloutBackend
from training.rollout_transformers import TransformersBackend
from training.rollout_vllm import VLLMBackend

_AT_ONCE = 64
_KV_CACHE = 0.2  # of the RAM, at most


def load_frozen(setting: Setting) -> Frozen:
    """The LLM as rewards read it."""
    model, tokenizer = load_model(str(setting.model), dtype=torch.bfloat16)
    base = identify(str(setting.model))
    return Frozen(model.eval(), tokenizer, base, DECODING, end_ids(model, tokenizer), _AT_ONCE)


def read_test_prompts(setting: Setting, name: str, tokenizer: Any) -> list[Prompt]:
    """The prompts of a part of the data, in its order."""
    chats = Conversations(tokenizer)
    rows = read_rows(setting.data(f"prompts_{name}"), ("prompt",))
    return [Prompt(row["prompt"], chats.prompt_ids(row["prompt"])) for row in rows]


@dataclass(frozen=True)
class LoadedPolicy:
    """What answers: an LLM, perhaps with a proxy or a system prompt."""

    model: PreTrainedModel
    network: ProxyNetwork | None
    backend: RolloutBackend
    frozen: Frozen
    system: str | None

    def read(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids that it reads."""
        return as_read(prompts, self.frozen.tokenizer, self.system)

    def respond(
        self, prompts: Sequence[list[int]], decoding: Decoding, key: int
    ) -> list[list[int]]:
        """A response to each prompt, by noise that only this key has."""
        return self.backend.responses(
            self.network,
            prompts,
            decoding,
            end_ids=self.frozen.end_ids,
            seeds=count(key << 32),
        )


def as_read(prompts: Sequence[Prompt], tokenizer: Any, system: str | None) -> list[list[int]]:
    if system is None:
        return [prompt.ids for prompt in prompts]
    chats, instruction = Conversations(tokenizer), Message(role="system", content=system)
    return [chats.prompt_ids([instruction, *prompt.messages]) for prompt in prompts]


def noise_key(name: str, seed: int) -> int:
    """A key for the answers of a row that no other row has."""
    return 1000 * (1 + list(METHODS).index(name)) + seed


@contextmanager
def open_policy(
    setting: Setting, method: Method, seed: int, frozen: Frozen, prompts: Sequence[Prompt]
) -> Iterator[LoadedPolicy]:
    """The policy of a trained method.

    Args:
        prompts: all that it will answer; the longest one sizes the engine.
    """
    trained = setting.directory(f"{method.job}/{seed}") / TRAINED
    system = SYSTEM_PROMPT if method.instructed else None
    longest = max(map(len, as_read(prompts, frozen.tokenizer, system)))
    network = load(trained, base=frozen.base).network if method.kind == "proxy" else None
    with tempfile.TemporaryDirectory() as merged:
        model, directory = frozen.model, setting.model
        if method.kind == "lora":
            model, directory = _merge(setting, trained, Path(merged), frozen.tokenizer)
        assert isinstance(model, PreTrainedModel), "no LoRA is trained here"
        backend: RolloutBackend
        if setting.rollout == "vllm":
            backend = VLLMBackend(
                model,
                directory,
                identify(str(directory)),
                max_tokens=longest + DECODING.max_new_tokens + 1,
                max_requests=2 * _AT_ONCE,
                memory=_KV_CACHE,
            )
        else:
            backend = TransformersBackend(model, batch_size=_AT_ONCE)
        with closing(backend):
            yield LoadedPolicy(model, network, backend, frozen, system)


def _merge(
    setting: Setting, lora: Path, directory: Path, tokenizer: Any
) -> tuple[PreTrainedModel, Path]:
    """The LLM with a LoRA in its weights, in memory and in the directory."""
    model = load_model(str(setting.model), dtype=torch.bfloat16)[0]
    merged = PeftModel.from_pretrained(model, lora).merge_and_unload().eval()
    merged.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return merged, directory
