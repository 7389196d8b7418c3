"""Direct preference optimisation (arXiv 2305.18290), with trl: a baseline that changes the LLM's own weights.

    python -m training.dpo --model runs/base --preferences preferences.jsonl --output runs/dpo

`training.reward_model` trains the implicit reward in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Json
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from judge.options import Positive, Seed
from proxy.checkpoint import resolve_model_dir
from training import checkpoints, output
from training.console import TrainingError, main_guard, read_options
from training.data import PAIR, Row, RowOptions, read_as
from training.metrics import TrainerMetrics
from training.models import (
    Conversations,
    context_of,
    end_ids,
    load_model,
    lora_config,
    refuse_unknown,
)
from training.output import Run
from training.saving import saving


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """Options of training on preference pairs."""

    model: str
    """The LLM to start from: a directory or a hub id."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name; other layouts of
    `judge.layouts` too."""
    output: Path
    """Directory for what is trained, its metrics and their curves."""
    held_out: str | None = None
    """Pairs to measure on after each pass, such as `training.prepare` sets aside."""
    beta: Positive = 0.1
    """β of DPO and of the implicit reward: the higher, the nearer to the start."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_rows: PositiveInt | None = None
    """Only the first so many pairs."""
    batch_size: PositiveInt = 32
    """Pairs in a batch."""
    gradient_accumulation: PositiveInt = 1
    """Batches before an update."""
    learning_rate: Positive = 2e-4
    """Peak of the linear schedule. 2e-4 suits a small model; use about 1e-6 for a pretrained LLM, 1e-5 with
    `lora_rank`."""
    lora_rank: NonNegativeInt = 0
    """Rank of a LoRA on all linear layers, to be trained in the place of the weights; 0 = none."""
    gradient_checkpointing: bool = False
    """Keep no activations but compute them again: a third slower, and much less memory."""
    max_length: PositiveInt = 1024
    """Pairs with a longer sequence, in tokens, and those beyond the model's context are left out and counted."""
    bf16: bool = True
    """Compute in bfloat16; weights and their updates stay in float32."""
    save_every: PositiveInt = 500
    """Steps between two checkpoints that `--resume` can go on from."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory, if there is one."""
    overwrite: bool = False
    """Replace what an earlier run of this command left in the output directory; other files stay."""
    seed: Seed = 0
    """Of the order of the data."""


READS = ("model", "preferences", "held_out")
"""Options that are inputs."""


def train(options: Options, run: Run) -> tuple[Any, Any]:
    """The trainer when it is done, and the tokenizer."""
    model, tokenizer = load_model(
        str(resolve_model_dir(options.model)),
        dtype=torch.bfloat16 if options.lora_rank else torch.float32,
    )
    end_ids(model, tokenizer)  # trl's own error says less
    settings = arguments(options, model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(beta=options.beta, **settings),
        **data(options, model, tokenizer, settings["max_length"]),
        processing_class=tokenizer,
        callbacks=[TrainerMetrics(options.output)],
        peft_config=lora_config(options.lora_rank) if options.lora_rank else None,
    )
    checkpoints.train(trainer, options, run)
    return trainer, tokenizer


def arguments(options: Options, model: PreTrainedModel) -> dict[str, Any]:
    """What trl's trainers are told."""
    return dict(
        **checkpoints.arguments(options.output, options.save_every),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="epoch" if options.held_out else "no",
        gradient_accumulation_steps=options.gradient_accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=options.learning_rate,
        max_length=min(options.max_length, context_of(model)),
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        report_to="none",
        logging_first_step=True,
    )


def data(
    options: Options, model: PreTrainedModel, tokenizer: Any, most: int
) -> dict[str, Dataset | None]:
    """The pairs to train on, and those to measure on, as trl's trainers take them; `most` tokens each at most.

    Raises:
        TrainingError: all pairs of one of the two are longer, or a token is beyond the model's embeddings.
    """
    held_out = options.held_out
    return {
        "train_dataset": _pairs(
            options.preferences, model, tokenizer, most, options, options.max_rows
        ),
        "eval_dataset": _pairs(held_out, model, tokenizer, most, options) if held_out else None,
    }


def _pairs(
    source: str,
    model: PreTrainedModel,
    tokenizer: Any,
    most: int,
    options: Options,
    max_rows: int | None = None,
) -> Dataset:
    chats = Conversations(tokenizer)

    def measured(row: Row) -> tuple[Row, int]:
        answers = [chats.ids([*row["prompt"], *row[answer]]) for answer in ("chosen", "rejected")]
        refuse_unknown(model, tokenizer, answers)
        return {field: chats.as_given(row[field]) for field in PAIR}, max(map(len, answers))

    rows = read_as(source, PAIR, options, measured, max_rows)
    kept = [row for row, tokens in rows if tokens <= most]
    if len(kept) < len(rows):
        print(f"{source}: left out {len(rows) - len(kept)} of {len(rows)} pairs over {most} tokens")
    if not kept:
        raise TrainingError(
            f"{source}: no pair is within {most} tokens: max_length, or the model's own"
        )
    # As JSON: Arrow would give all messages the same keys.
    return Dataset.from_list(kept, features=Features(dict.fromkeys(PAIR, Json())))


def save(
    options: Options,
    trainer: Any,
    tokenizer: Any,
    add: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Save model or LoRA with its tokenizer, and what `add` writes beside them, as a whole."""
    if not trainer.is_world_process_zero():
        return
    if not options.lora_rank:
        trainer.model.to(torch.bfloat16)
    with saving(options.output) as directory:
        trainer.model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        add(directory)
    checkpoints.remove_all(options.output)


def main(options: Options) -> None:
    with output.run(options, "training.dpo", reads=READS, writes=checkpoints.WRITES) as run:
        if not run.is_finished:
            save(options, *train(options, run))


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
