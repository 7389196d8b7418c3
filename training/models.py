"""Models, their tokenizers, and chats as they read them."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import GENERATION_CONFIG_NAME

from judge.messages import Message, as_texts
from training.console import TrainingError
from training.logprobs import add_logprobs


class CausalLM(Protocol):
    """What is asked of a causal LM, with a LoRA or without."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **inputs: Any) -> Any: ...


class Conversations:
    """Turns chats into token ids the way the server will."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise TrainingError("the model's tokenizer has no chat template; give it one first")
        self.tokenizer = tokenizer

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to where the assistant begins to speak."""
        return self._encode(messages, add_generation_prompt=True)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that ends with an answer."""
        return self._encode(messages, add_generation_prompt=False)

    def split_ids(
        self, prompt: Sequence[Message], response: str | Message
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids(prompt)`, and the ids of the response that follows, end of turn included."""
        turn = (
            Message(role="assistant", content=response) if isinstance(response, str) else response
        )
        return self.split_turns(prompt, [turn])

    def split_turns(
        self, prompt: Sequence[Message], turns: Sequence[Message]
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids(prompt)`, and the ids of the turns that follow, the assistant's first."""
        ids = self.ids([*prompt, *turns])
        start = self.prompt_ids(prompt)
        if ids[: len(start)] != start:
            raise TrainingError(
                "the chat template writes a conversation with an answer differently from one that awaits it; "
                "such a template cannot be trained on answer by answer"
            )
        return start, ids[len(start) :]

    def as_given(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the chat template gets them, which may know less than they say.

        Where it knows no developer, vLLM has it read system messages, all of them as one at the start; where it writes
        no tool calls, they are written as the judge reads them.
        """
        if not self._writes_calls and any("tool_calls" in message for message in messages):
            messages = as_texts(messages)
        roles = {message["role"] for message in messages}
        if "developer" not in roles or "developer" in str(self.tokenizer.chat_template):
            return list(messages)
        instructing = ("system", "developer")
        instructions = [m["content"] for m in messages if m["role"] in instructing and m["content"]]
        others = [message for message in messages if message["role"] not in instructing]
        return [Message(role="system", content="\n\n".join(instructions)), *others]

    @cached_property
    def _writes_calls(self) -> bool:
        """Whether the chat template writes tool calls."""
        function = {"name": "name_of_a_probe", "arguments": {}}
        call = {"id": "123456789", "type": "function", "function": function}
        asked = Message(role="user", content="x")
        called = Message(role="assistant", content="", tool_calls=[call])
        try:
            text = self.tokenizer.apply_chat_template([asked, called], tokenize=False)
        except TemplateError:
            return False
        return "name_of_a_probe" in text

    def _encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(
                self.as_given(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        # TypeError: a template that calculates with what is not there.
        except (TemplateError, TypeError) as error:
            raise TrainingError(
                f"the model's chat template refuses the conversation: {error}"
            ) from None


def load_model(
    name: str, attention: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer.

    Args:
        name: a directory or a hub id.
        attention: transformers' name of the attention code; "auto" takes `attention_of`'s.

    Raises:
        TrainingError: there is no such model.
    """
    register_attention()
    with loading(f"the model {name!r}"):
        implementation = attention_of(name) if attention == "auto" else attention
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=implementation, output_loading_info=True
        )
        if (Path(name) / GENERATION_CONFIG_NAME).is_file():  # a damaged one is passed over
            GenerationConfig.from_pretrained(name)
    if found["missing_keys"]:  # which would be drawn at random
        raise TrainingError(
            f"cannot load the model {name!r}: its weights lack {sorted(found['missing_keys'])[0]}; is it a causal LM?"
        )
    tokenizer = load_tokenizer(name)
    for kind in ("pad", "eos", "bos"):
        token = getattr(tokenizer, f"{kind}_token_id")
        refuse_unknown(model, tokenizer, [[] if token is None else [token]])
    add_logprobs(model)
    return model, tokenizer


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while files are read that somebody gave us into a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # of safetensors, tokenizers, json, of a config without a key...
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise TrainingError(f"cannot load {what}: {kind}{error}") from error


def refuse_unknown(model: PreTrainedModel, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """
    Raises:
        TrainingError: a token id is beyond the model's embeddings.
    """
    most = model.get_input_embeddings().weight.shape[0]
    unknown = max((max(row, default=0) for row in rows), default=0)
    if unknown >= most:
        raise TrainingError(
            f"the token {tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) of the model's tokenizer is beyond "
            f"its {most} embeddings: resize them (resize_token_embeddings), or do without the token"
        )


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer.

    Raises:
        TrainingError: there is none.
    """
    with loading(f"the tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(name)


def attention_of(name: str) -> str | None:
    """The attention code that computes what the model was trained with; None = transformers' choice.

    PyTorch's fused attention cannot cap its scores. Gemma 2 needs that, and would silently do without.
    """
    config = AutoConfig.from_pretrained(name).get_text_config()
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def register_attention() -> None:
    """Have models made from now on attend as here."""
    AttentionInterface.register("sdpa", _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA; in float32 where a CPU trains.

    PyTorch's kernel takes five times as long there, backwards in bfloat16.
    """
    if query.device.type != "cpu" or not (torch.is_grad_enabled() or module.training):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **options
        )
    return attended.to(value.dtype), None


def read_config(name: str) -> PretrainedConfig:
    """A model's config.

    Raises:
        TrainingError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # a config may lack anything
        raise TrainingError(f"cannot read the config of {name!r}: {error}") from error


def model_without_weights(name: str) -> PreTrainedModel:
    """A model of the config and the generation config in a directory, whose tensors have shapes and no values.

    Raises:
        TrainingError: there is no such config, or none of a causal LM.
    """
    config = read_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config may lack anything
        raise TrainingError(f"cannot read the config of {name!r}: {error}") from error
    if (Path(name) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def read_embeddings(directory: Path, model: PreTrainedModel) -> Tensor:
    """The input embeddings of a model in a directory, [V, H], mapped from its file: what is not looked at is not read.

    Args:
        model: of this directory, perhaps without weights.

    Raises:
        TrainingError: they are not found.
    """
    weight = model.get_input_embeddings().weight
    names = [name for name, parameter in model.named_parameters() if parameter is weight]
    suffix = ".".join(names[0].split(".")[-2:])
    for path in sorted(directory.glob("*.safetensors")):
        with loading(f"the embeddings in {str(path)!r}"), safe_open(path, "pt") as file:
            # A checkpoint may name it without the parts in front.
            for key in sorted(file.keys(), key=lambda key: key not in names):
                if key.endswith(suffix) and file.get_slice(key).get_shape() == [*weight.shape]:
                    return file.get_tensor(key)
    raise TrainingError(f"{directory} has no tensor {names[0]!r}: the LLM's input embeddings")


def context_of(model: PreTrainedModel | PretrainedConfig) -> int:
    """The longest sequence that the model reads, in tokens, as its config has it."""
    config = getattr(model, "config", model).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def end_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end a response, as the server takes them: the generation config's and the tokenizer's.

    Raises:
        TrainingError: there is none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    found = {end for end in (*several, tokenizer.eos_token_id) if end is not None}
    if not found:
        raise TrainingError(
            "nothing ends a response: neither the model's generation config nor its tokenizer has an end-of-sequence "
            "token; set eos_token_id in generation_config.json"
        )
    return found


def lora_config(rank: int) -> LoraConfig:
    """On all linear layers but the head, with α = 2 · rank, as arXiv 2405.09673 recommends."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


class Adapted:
    """The frozen LLM with a LoRA that acts in calls of this object alone: elsewhere it stays the frozen LLM."""

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


class Other:
    """The LLM with another LoRA than the one that learns, in calls of this object alone."""

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


class Plain:
    """The LLM without the LoRA that has been put on it."""

    def __init__(self, model: PeftModel) -> None:
        self._lora = model

    @property
    def device(self) -> torch.device:
        return self._lora.device

    def __call__(self, **inputs: Any) -> Any:
        with self._lora.disable_adapter():
            return self._lora.base_model(**inputs)


def response_logprobs(model: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """log π of the responses' tokens, 0 elsewhere; without the logits of the others, nor those of all at once.

    Args:
        ids: [N, T + 1], padded on the right: under a causal mask that changes nothing before it
        mask: [N, T] bool, True = the token after the position belongs to the response

    Returns:
        [N, T] nats.
    """
    kept = mask.flatten().nonzero().squeeze(-1)
    places = kept + kept // mask.shape[1]  # the position before, in rows that are longer by one
    logprobs = model(input_ids=ids, places=places, targets=ids[:, 1:][mask])
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens but the first: [N, T + 1, V], [N, T + 1] -> [N, T], natural log."""
    return -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
