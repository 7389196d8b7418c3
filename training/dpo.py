"""Direct preference optimisation (arXiv 2305.18290): a baseline that trains the LLM's own weights.

    python -m training.dpo --model runs/base --preferences preferences.jsonl --output runs/dpo

`training.reward_model` trains the implicit reward in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pydantic import NonNegativeInt, PositiveInt
from transformers import TrainingArguments

from judge.options import Positive, Seed
from proxy.checkpoint import resolve_model_dir
from training import checkpoints, output
from training.adapters import lora_config
from training.console import main_guard, read_options
from training.conversations import Conversations
from training.memory import Plan, Work, plan
from training.metrics import TrainerMetrics
from training.model_card import Score
from training.models import (
    context_of,
    end_ids,
    load_model,
    load_tokenizer,
    read_config,
    refuse_unknown,
)
from training.output import Run
from training.pair_trainer import ImplicitTrainer
from training.pairs import Pair, load_pairs
from training.publish import publish
from training.run_card import write_card
from training.run_options import RunOptions
from training.saving import saving


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of training on preference pairs."""

    model: str
    """The LLM to start from: a directory or a hub id."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name. Other layouts of
    `judge.layouts` are accepted too.
    """
    output: Path
    """Directory for the model, its metrics and their curves."""
    held_out: str | None = None
    """Pairs to evaluate on after each pass, for example those that `training.prepare` sets aside."""
    beta: Positive = 0.1
    """β of DPO and of the implicit reward: a higher one stays nearer to the initial model."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_rows: PositiveInt | None = None
    """Use only the first rows, up to this number."""
    batch_size: PositiveInt = 32
    """Pairs in a gradient step, on each device. They are computed in parts that fit the memory, which changes only
    rounding.
    """
    learning_rate: Positive = 2e-4
    """Peak of the linear schedule. 2e-4 suits a small model; use about 1e-6 for a pretrained LLM, 1e-5 with
    `lora_rank`."""
    lora_rank: NonNegativeInt = 0
    """Rank of a LoRA on all linear layers, trained instead of the weights; 0 = none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third slower, with much less memory. Done in any case where a pair
    would not fit otherwise.
    """
    max_length: PositiveInt = 1024
    """Longer pairs, in tokens, and those beyond the model's context are left out and counted."""
    bf16: bool = True
    """Compute in bfloat16; weights and their updates stay in float32."""
    save_every: PositiveInt = 500
    """Steps between two checkpoints that `--resume` can continue from."""
    resume: bool = False
    """Continue from the last checkpoint in the output directory, if there is one."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of the order of the data."""


READS = ("model", "preferences", "held_out")
"""Options that are inputs."""


def train(options: Options, run: Run) -> tuple[Any, Any]:
    """Train; returns the trainer and the tokenizer."""
    directory = str(resolve_model_dir(options.model))
    tokenizer = load_tokenizer(directory)
    pairs = read(options, tokenizer, directory)
    planned = plan_for(options, pairs, directory)
    model: Any = load_model(
        directory, dtype=torch.bfloat16 if options.lora_rank else torch.float32
    )[0]
    end_ids(model, tokenizer)
    refuse_unknown(
        model, tokenizer, (ids for split_pairs in pairs for pair in split_pairs for ids in pair)
    )
    if options.lora_rank:
        torch.manual_seed(options.seed)  # for the LoRA's weights
        model = get_peft_model(model, lora_config(options.lora_rank))
        if planned.checkpointing:
            model.enable_input_require_grads()
    trainer = ImplicitTrainer(
        model,
        arguments(options, planned),
        *pairs,
        beta=options.beta,
        resume=options.resume,
        max_tokens=planned.tokens,
        callbacks=[TrainerMetrics(options), planned.record(options.output)],
    )
    checkpoints.train(trainer, options, run)
    run.scores = pair_scores(trainer)
    return trainer, tokenizer


def read(options: Options, tokenizer: Any, directory: str) -> tuple[list[Pair], list[Pair]]:
    """The training pairs and the held-out pairs."""
    chats = Conversations(tokenizer)
    limit = min(options.max_length, context_of(read_config(directory)))
    held_out = load_pairs(options.held_out, chats, limit, options) if options.held_out else []
    return load_pairs(options.preferences, chats, limit, options, options.max_rows), held_out


def plan_for(options: Options, pairs: tuple[list[Pair], list[Pair]], directory: str) -> Plan:
    """How many tokens fit into this machine's memory at once. Prints it.

    Raises:
        TrainingError: not even one pair fits.
    """
    all_pairs = [pair for split_pairs in pairs for pair in split_pairs]
    work = Work(
        model=directory,
        longest=max(sum(map(len, pair)) for pair in all_pairs),
        least=2 * max(pair.longest for pair in all_pairs),
        lora_rank=options.lora_rank,
        bf16=options.bf16,
        checkpointing=options.gradient_checkpointing,
    )
    lower = "lower --max-length, or train a LoRA with --lora-rank"
    return plan(work, lower, options.output if options.resume else None)


def arguments(options: Options, planned: Plan) -> TrainingArguments:
    """Arguments of transformers' trainer."""
    return TrainingArguments(
        **checkpoints.arguments(options.output, options.save_every),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="epoch" if options.held_out else "no",
        gradient_checkpointing=planned.checkpointing,
        learning_rate=options.learning_rate,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        report_to="none",
        logging_steps=10,
        logging_first_step=True,
        remove_unused_columns=False,
    )


def pair_scores(trainer: Any) -> list[Score]:
    """How many of the held-out pairs are scored correctly after the last pass."""
    name = "eval_rewards/accuracies"
    shares = [row[name] for row in trainer.state.log_history if name in row]
    if not shares:
        return []
    count = len(trainer.eval_dataset)
    error = (shares[-1] * (1 - shares[-1]) / count) ** 0.5
    return [Score("chosen response scored higher", shares[-1], error, count, "held-out pairs")]


def save(
    options: Options,
    trainer: Any,
    tokenizer: Any,
    add: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Save model or LoRA with its tokenizer and the files that `add` writes, as a whole."""
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
            write_card(run, options)
    publish(run, options)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
