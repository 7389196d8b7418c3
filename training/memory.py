"""How many tokens a gradient step may hold at once: the computed need of a training and the memory of the machine.

The need is counted in tensors: weights, gradients, Adam's moments, and what autograd keeps of a forward, which is run
on tensors that have shapes and no memory. It needs the LLM's config and the lengths in the data, no weights.
`tests/training/test_memory.py` compares it with real steps.
"""

import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, TrainerCallback

from training.adapters import lora_config
from training.checkpoints import PLAN_FILE
from training.console import TrainingError
from training.logprobs import CHUNK
from training.machine import Machine, machine, print_once
from training.models import attention_of, loading, read_config, register_attention
from training.sizes import Sizes, activation_bytes, rollout_bytes

SLACK = 1.25
"""Memory of glibc's heap divided by the size of the tensors in it: measured in steps on a CPU. CUDA's allocator needs
less.
"""
PROCESS = 5e8
"""Bytes of Python and its libraries."""
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}
"""More tokens at once bring no speed-up: matrix products of this size reach a device's full speed."""
MOST_BYTES = 1e9
"""The same limit in bytes of activations, for models so small that their tokens take few."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, and how."""

    model: str  # directory or hub id
    longest: int  # tokens of the longest sequence
    least: int = 0  # tokens that must be computed together: a row with several sequences
    lora_rank: int = 0  # 0 = all weights
    bf16: bool = True  # compute in bfloat16
    checkpointing: bool = False
    other_bytes: float = 0  # bytes of other models
    graphs: int = 1  # models of this size that are differentiated at once


class Need(NamedTuple):
    """Bytes that training needs."""

    staying: float  # weights, gradients, moments
    fixed: float  # of a step, for any number of tokens
    per_token: float  # of a token, in sequences of the longest length

    def of(self, tokens: int) -> float:
        """The total with this many tokens at once."""
        return PROCESS + self.staying + SLACK * (self.fixed + self.per_token * tokens)


def need(work: Work) -> Need:
    """The memory of a gradient step.

    Raises:
        TrainingError: there is no such model.
    """
    model = _shapes(work)
    config = model.config.get_text_config()
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in trained)
    moments = 8 * sum(p.numel() for p in trained)  # in float32
    one_row, two_rows = (_kept(model, rows, work) for rows in (1, 2))
    fixed, per_token = 2 * one_row - two_rows, (two_rows - one_row) / work.longest
    layers = config.num_hidden_layers
    passing = per_token / layers / 2  # temporary gradients: about half of what a layer keeps
    if work.checkpointing:  # the inputs of all layers, and all activations of one layer
        size = 2 if work.lora_rank else 4
        per_token = layers * config.hidden_size * size + per_token / layers
    per_token += passing
    head = 12 * min(CHUNK, config.vocab_size * work.longest)  # logits in three dtypes
    staying = frozen + work.graphs * (2 * weights + moments) + work.other_bytes
    return Need(staying, work.graphs * fixed + head, work.graphs * per_token)


def _shapes(work: Work) -> Any:
    """The model with tensors that use no memory, on a CPU."""
    register_attention()
    with loading(f"the model {work.model!r}"):
        config = read_config(work.model)
        dtype = torch.bfloat16 if work.lora_rank else torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_of(work.model)
            )
            if work.lora_rank:
                model = get_peft_model(model, lora_config(work.lora_rank))
    mode = FakeTensorMode()
    made: dict[int, nn.Parameter] = {}  # tied parameters are made once

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            made.setdefault(id(p), nn.Parameter(fake(p), p.requires_grad))
            module.register_parameter(name, made[id(p)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))
    model.fake_mode = mode
    return model.train()


def _kept(model: Any, rows: int, work: Work) -> int:
    """Bytes that autograd keeps of a forward of the body, without the weights."""
    weights = {id(p.untyped_storage()) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[id(storage)] = storage
        return tensor

    body = model.get_base_model().base_model if work.lora_rank else model.base_model
    with (
        model.fake_mode,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=work.bf16),
    ):
        # Attention with a mask keeps more than without one; no command keeps more than this.
        inputs = {"input_ids": torch.zeros(rows, work.longest, dtype=torch.long)}
        if "position_ids" in inspect.signature(body.forward).parameters:
            shape = (rows, 1, work.longest, work.longest)
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.bool)
        body(**inputs, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


class Plan(NamedTuple):
    """How a batch is split."""

    tokens: int  # at once, including padding
    checkpointing: bool

    def record(self, output: Path) -> TrainerCallback:
        """Writes the plan beside the run's checkpoints: a resumed run with another plan would round differently."""
        return _Recording(self, output)


class _Recording(TrainerCallback):
    def __init__(self, planned: Plan, output: Path) -> None:
        self._plan, self._path = planned, output / PLAN_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._plan))


def fit(work: Work, available: Machine) -> tuple[Plan | None, Need]:
    """How many tokens fit at once, and the memory that they need; None = not even the longest row of the data fits."""
    least = max(work.least, work.longest)
    for checkpointing in sorted({work.checkpointing, True}):
        memory_need = need(replace(work, checkpointing=checkpointing))
        if memory_need.of(least) <= available.budget:
            break
    else:
        return None, memory_need
    fits = int((available.budget - memory_need.of(0)) / (SLACK * memory_need.per_token))
    useful = max(MOST_TOKENS[available.device], int(MOST_BYTES / memory_need.per_token))
    return Plan(max(least, min(fits, useful)), checkpointing), memory_need


def plan(work: Work, options: str, resumed: Path | None = None) -> Plan:
    """How many tokens fit at once on this machine. Prints it.

    Args:
        work: with `checkpointing` if the user wants it; else it is used only if nothing fits without.
        options: what the user may lower, for the message.
        resumed: the output of the run that is resumed, whose plan is kept.

    Raises:
        TrainingError: not even the longest row of the data fits.
    """
    available, least = machine(), max(work.least, work.longest)
    planned, memory_need = fit(work, available)
    if planned is None:
        raise TrainingError(
            f"not enough memory: training {work.model} takes {memory_need.of(least) / GB:.1f} GB with the {least} "
            f"tokens of the longest row, of {available.free / GB:.1f} GB {available.what}, a tenth of which is kept "
            f"free: {options}"
        )
    if resumed and (resumed / PLAN_FILE).is_file():
        planned = Plan(*json.loads((resumed / PLAN_FILE).read_text()))
        memory_need = need(replace(work, checkpointing=planned.checkpointing))
    again = ", activations computed again" * planned.checkpointing
    print_once(
        f"memory: {memory_need.of(planned.tokens) / GB:.1f} GB needed, {available.free / GB:.1f} GB {available.what}; "
        f"{planned.tokens} tokens at once{again}"
    )
    return planned


def responses_at_once(
    sizes: Sizes, max_responses: int, prompt: int, response: int, size: int, other_bytes: float
) -> int:
    """How many responses are sampled and scored at once on this machine. Prints it.

    Args:
        wanted: the maximum; it is halved until they fit.
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.
        size: bytes of a number of the frozen LLM.
        other_bytes: bytes of other data in memory.

    Raises:
        TrainingError: not even one fits.
    """
    available, rows = machine(), max_responses

    def bytes_of(rows: int) -> float:
        logits = min(CHUNK, rows * response * sizes.vocab)
        scoring = activation_bytes(sizes, rows * (prompt + response), size) + 12 * logits
        phase = max(rollout_bytes(sizes, rows, prompt, response, size), scoring)
        return PROCESS + sizes.parameters * size + other_bytes + SLACK * phase

    while rows > 1 and bytes_of(rows) > available.budget:
        rows //= 2
    if bytes_of(rows) > available.budget:
        raise TrainingError(
            f"not enough memory: the models and one response take {bytes_of(rows) / GB:.1f} GB, and of "
            f"{available.free / GB:.1f} GB {available.what} a tenth is kept free: lower --max-prompt-tokens or "
            "--decoding.max-new-tokens, or take a smaller model"
        )
    print_once(
        f"memory: {bytes_of(rows) / GB:.1f} GB needed, {available.free / GB:.1f} GB {available.what}; "
        f"{rows} responses at once"
    )
    return rows
