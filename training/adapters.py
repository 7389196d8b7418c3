"""A LoRA on the frozen LLM: with it, without it, or with another one, per call."""

from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel


class CausalLM(Protocol):
    """The interface of a causal LM that callers use, with a LoRA or without."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **inputs: Any) -> Any: ...


def lora_config(
    rank: int, task_type: Literal["CAUSAL_LM", "FEATURE_EXTRACTION"] = "CAUSAL_LM"
) -> LoraConfig:
    """A LoRA on all linear layers but the head, with α = 2 · rank, as arXiv 2405.09673 recommends."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task_type)


class WithAdapter:
    """The frozen LLM with a LoRA that is active in calls of this object only. Elsewhere the LLM stays frozen."""

    def __init__(self, model: PeftModel) -> None:
        self._lora = model.base_model
        self._lora.disable_adapter_layers()

    @property
    def device(self) -> torch.device:
        return self._lora.device

    def __call__(self, **inputs: Any) -> Any:
        self._lora.enable_adapter_layers()
        try:
            return self._lora(**inputs)
        finally:
            self._lora.disable_adapter_layers()


class SwitchedAdapter:
    """The LLM with another LoRA than the one that is trained, in calls of this object only."""

    def __init__(self, model: PeftModel, name: str) -> None:
        self._lora, self._name, self._own = model, name, model.active_adapter

    @property
    def device(self) -> torch.device:
        return self._lora.device

    def __call__(self, **inputs: Any) -> Any:
        self._lora.set_adapter(self._name)
        try:
            return self._lora.base_model(**inputs)
        finally:
            self._lora.set_adapter(self._own)


class WithoutAdapter:
    """The LLM without its LoRA."""

    def __init__(self, model: PeftModel) -> None:
        self._lora = model

    @property
    def device(self) -> torch.device:
        return self._lora.device

    def __call__(self, **inputs: Any) -> Any:
        with self._lora.disable_adapter():
            return self._lora.base_model(**inputs)
