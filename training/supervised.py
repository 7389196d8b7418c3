"""Supervised training on token sequences with a weight per token, shared by `training.sft` and `training.jsft`.

The loss of a batch is Σ weight · cross-entropy over its tokens, divided by a constant (sequences in a batch × the data
set's mean weight per sequence). Dividing by the tokens of the batch would give a token more weight the shorter the
other sequences are: batches are grouped by length, so short answers would be over-weighted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import get_peft_model
from pydantic import PositiveInt
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from judge.options import NonNegative, Positive, Seed, Share
from training import checkpoints
from training.adapters import lora_config
from training.console import TrainingError
from training.conversations import Conversations
from training.data import Row, read_as
from training.logprobs import token_logprobs
from training.memory import Plan, Work, plan
from training.metrics import TrainerMetrics
from training.micro_batches import MicroBatchTrainer, split_by_tokens
from training.models import context_of, load_model, read_config, refuse_unknown
from training.output import Run
from training.run_options import RunOptions
from training.saving import saving


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of both commands."""

    model: str
    """Model to train: a directory or a hub id."""
    output: Path
    """Directory for the trained model, its metrics and their curves."""
    epochs: Positive = 1.0
    """Passes over the data."""
    batch_size: PositiveInt = 64
    """Sequences in a gradient step, on each device. They are computed in parts that fit the memory, which changes only
    rounding.
    """
    learning_rate: Positive = 2e-3
    """Peak of the cosine schedule. 2e-3 suits a small model from scratch; use about 2e-5 for a pretrained LLM."""
    warmup: Share = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay."""
    prompt_weight: NonNegative = 0.0
    """Loss weight of tokens outside answers. Above 0, a model trained from scratch learns to read sooner."""
    max_length: PositiveInt = 1024
    """Longer sequences, in tokens, and those beyond the model's context are left out and counted."""
    bf16: bool = True
    """Compute in bfloat16; weights and their updates stay in float32."""
    compile: bool = False
    """Compile the model with torch.compile: takes a minute to start, then up to twice as fast on a CPU."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; "auto" is correct for every model. With `compile` and short sequences on a CPU, "eager"
    is half as fast again.
    """
    save_every: PositiveInt = 500
    """Steps between two checkpoints that `--resume` can continue from."""
    resume: bool = False
    """Continue from the last checkpoint in the output directory, if there is one."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of the order of the data."""


class Example(NamedTuple):
    """A sequence and the loss weight of each token."""

    token_ids: list[int]
    weights: list[float]  # 0 = context only


def read_answers(source: str, chats: Conversations, options: Options) -> list[Example]:
    """Examples whose target is the last assistant turn of each conversation.

    Raises:
        TrainingError: as `training.data.read_as`.
    """

    def example(row: Row) -> Example:
        *prompt, answer = row["messages"]
        context, response = chats.split_ids(prompt, answer)
        weights = [options.prompt_weight] * len(context) + [1.0] * len(response)
        return Example(context + response, weights)

    return read_as(source, ("messages",), options, example)


def weighted_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · −log p(token | what precedes it).

    Args:
        logprobs: [M] nats
        weights: [M]
    """
    return -(logprobs * weights).sum()


class _ByLength(LengthGroupedSampler):
    """Batches of sequences of similar length, in random order.

    transformers' own order starts every fifty batches with the longest, so judgments with and without rationales would
    alternate. Seed and pass determine the order, so a run can be resumed within a pass.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each pass."""
        self.generator.manual_seed((self.seed << 32) + epoch)

    def __iter__(self) -> Iterator[int]:
        batches = torch.tensor(list(super().__iter__())).split(self.batch_size)
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        return iter(torch.cat([batches[i] for i in order]).tolist())


class Sequences(NamedTuple):
    """B examples, padded on the right."""

    token_ids: Tensor  # [B, T]
    weights: Tensor  # [B, T]; the first token of a sequence has no prediction, so its weight has no effect


class _WeightedTrainer(MicroBatchTrainer):
    """transformers' trainer with the loss and the order of this module."""

    loss_divisor: float
    compiled: bool

    def _get_train_sampler(self, train_dataset: Any = None) -> _ByLength:
        lengths = [len(row["input_ids"]) for row in train_dataset or self.train_dataset]
        return _ByLength(lengths, self.args.train_batch_size, self.args.seed)

    def parts(self, inputs: Any) -> list[Sequences]:
        ids, weights = inputs["input_ids"], inputs["weights"]
        if ids.numel() <= self.max_tokens:
            return [Sequences(ids, weights)]
        lengths = inputs["lengths"].tolist()
        return [
            Sequences(*(tensor[part, : _padded(lengths[part[0]])] for tensor in (ids, weights)))
            for part in split_by_tokens([_padded(length) for length in lengths], self.max_tokens)
        ]

    def part_loss(self, model: Any, part: Sequences) -> Tensor:
        # Under a causal mask, right padding changes nothing with a weight, so no attention mask is needed.
        ids, weights = part.token_ids, part.weights[:, 1:].flatten()
        targets = ids[:, 1:].flatten()
        if self.compiled:  # computing all logits at once compiles best
            logprobs = token_logprobs(model(input_ids=ids).logits, ids).flatten()
        else:
            kept = weights.nonzero().squeeze(-1)
            targets, weights = targets[kept], weights[kept]
            row = ids.shape[1] - 1  # positions with a next token
            logprobs = model(input_ids=ids, places=kept + kept // row, targets=targets)
        return weighted_loss(logprobs, weights) / self.loss_divisor


def _padded(length: int) -> int:
    """Few widths, because code is compiled for each."""
    return math.ceil(length / 8) * 8


def _within(examples: list[Example], limit: int) -> list[Example]:
    """Examples of at most `limit` tokens; others are counted.

    Raises:
        TrainingError: there is none.
    """
    kept = [example for example in examples if len(example.token_ids) <= limit]
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} sequences over {limit} tokens")
    if not kept:
        raise TrainingError(
            f"no sequence is within {limit} tokens: --max-length, or the model's context"
        )
    return kept


def _collate(batch: list[dict[str, Any]], limit: int) -> dict[str, Tensor]:
    lengths = [len(row["input_ids"]) for row in batch]
    width = min(_padded(max(lengths)), limit)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # padding: its weight is 0
    weights = torch.zeros(len(batch), width)
    for i, row in enumerate(batch):
        ids[i, : lengths[i]] = torch.tensor(row["input_ids"])
        weights[i, : lengths[i]] = torch.tensor(row["weights"])
    return {"input_ids": ids, "weights": weights, "lengths": torch.tensor(lengths)}


def _arguments(options: Options, planned: Plan, batch_size: int, steps: float) -> TrainingArguments:
    return TrainingArguments(
        **checkpoints.arguments(options.output, options.save_every),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=planned.checkpointing,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(options.warmup * steps),
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=options.compile,
        seed=options.seed,
        report_to="none",
        logging_steps=10,
        logging_first_step=True,
        remove_unused_columns=False,
    )


def train(
    tokenizer: Any,
    examples: list[Example],
    options: Options,
    run: Run,
    lora_rank: int = 0,
    add: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Train on `examples`, then save the model in bfloat16, or its LoRA, with the tokenizer and the files that `add`
    writes.
    """
    limit = min(options.max_length, context_of(read_config(options.model)))
    kept = _within(examples, limit)
    longest = max(len(example.token_ids) for example in kept)
    work = Work(model=options.model, longest=longest, lora_rank=lora_rank, bf16=options.bf16)
    planned = plan(work, "lower --max-length", options.output if options.resume else None)
    model: Any = load_model(
        options.model, options.attention, torch.bfloat16 if lora_rank else torch.float32
    )[0]
    refuse_unknown(model, tokenizer, (example.token_ids for example in kept))
    if lora_rank:
        torch.manual_seed(options.seed)  # for the LoRA's weights
        model = get_peft_model(model, lora_config(lora_rank))
        if planned.checkpointing:
            model.enable_input_require_grads()

    batch_size = min(options.batch_size, len(kept))
    steps = math.ceil(len(kept) / batch_size) * options.epochs
    trainer = _WeightedTrainer(
        max_tokens=planned.tokens,
        model=model,
        args=_arguments(options, planned, batch_size, steps),
        train_dataset=[{"input_ids": e.token_ids, "weights": e.weights} for e in kept],
        data_collator=partial(_collate, limit=limit),
        callbacks=[TrainerMetrics(options), planned.record(options.output)],
    )
    trainer.loss_divisor = batch_size * sum(sum(e.weights) for e in kept) / len(kept)
    trainer.compiled = options.compile
    checkpoints.train(trainer, options, run)
    if trainer.is_world_process_zero():
        with saving(options.output) as directory:
            if not lora_rank:
                model.to(torch.bfloat16)
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            add(directory)
        checkpoints.remove_all(options.output)
