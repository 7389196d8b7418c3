"""Models and tokenizers from directories or the hub."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import GENERATION_CONFIG_NAME

from training.console import TrainingError
from training.logprobs import add_logprobs


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
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=implementation, output_loading_info=True
        )
        if (Path(name) / GENERATION_CONFIG_NAME).is_file():  # transformers ignores a damaged one
            GenerationConfig.from_pretrained(name)
    if loading_info["missing_keys"]:  # transformers would initialise them randomly
        raise TrainingError(
            f"cannot load the model {name!r}: its weights lack {min(loading_info['missing_keys'])}; is it a causal LM?"
        )
    tokenizer = load_tokenizer(name)
    for kind in ("pad", "eos", "bos"):
        token = getattr(tokenizer, f"{kind}_token_id")
        refuse_unknown(model, tokenizer, [[] if token is None else [token]])
    add_logprobs(model)
    return model, tokenizer


@contextmanager
def loading(description: str) -> Iterator[None]:
    """Turn any error while a user's files are loaded into a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # from safetensors, tokenizers, json, a config with a missing key...
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise TrainingError(f"cannot load {description}: {kind}{error}") from error


def refuse_unknown(model: PreTrainedModel, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """
    Raises:
        TrainingError: a token id is beyond the model's embeddings.
    """
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    unknown = max((max(row, default=0) for row in rows), default=0)
    if unknown >= num_embeddings:
        raise TrainingError(
            f"the token {tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}) of the model's tokenizer is beyond "
            f"its {num_embeddings} embeddings: resize them (resize_token_embeddings), or do without the token"
        )


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer.

    Raises:
        TrainingError: it cannot be loaded.
    """
    with loading(f"the tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(name)


def attention_of(name: str) -> str | None:
    """The attention implementation that computes what the model was trained with; None = transformers' choice.

    PyTorch's fused attention cannot cap its scores. Gemma 2 needs the cap, and transformers would silently leave it
    out.
    """
    config = AutoConfig.from_pretrained(name).get_text_config()
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def register_attention() -> None:
    """Register this module's attention for models that are loaded from now on."""
    AttentionInterface.register("sdpa", _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, in float32 where a CPU trains.

    PyTorch's kernel takes five times as long there in a bfloat16 backward.
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
    """A model from the config and the generation config in a directory, whose tensors have shapes and no values.

    Raises:
        TrainingError: there is no such config, or it is not of a causal LM.
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
    """The input embeddings of a model in a directory, [V, H], mapped from its file: rows are read from disk when they
    are used.

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
            # A checkpoint may omit the leading parts of the name.
            for key in sorted(file.keys(), key=lambda key: key not in names):
                if key.endswith(suffix) and file.get_slice(key).get_shape() == [*weight.shape]:
                    return file.get_tensor(key)
    raise TrainingError(f"{directory} has no tensor {names[0]!r}: the LLM's input embeddings")


def context_of(model: PreTrainedModel | PretrainedConfig) -> int:
    """The longest sequence that the model reads, in tokens, from its config."""
    config = getattr(model, "config", model).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def end_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end a response, as on the server: the generation config's and the tokenizer's.

    Raises:
        TrainingError: there is none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured_ids = configured if isinstance(configured, list) else [configured]
    ends = {end for end in (*configured_ids, tokenizer.eos_token_id) if end is not None}
    if not ends:
        raise TrainingError(
            "no token ends a response: neither the model's generation config nor its tokenizer has an end-of-sequence "
            "token; set eos_token_id in generation_config.json"
        )
    return ends
