"""Train a reward model on preference pairs, with trl.

    python -m training.reward_model --model runs/base --preferences preferences.jsonl --output runs/reward

`--kind implicit` (the default) trains a copy of the LLM with the Bradley–Terry (DPO) loss; its reward is
β·log(π_rm/π_ref). `--kind scalar` trains the LLM's body with one linear head, as RLHF has it. In small models the
implicit reward sees relations (the wrong object, the wrong fact) that the scalar head does not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from proxy.checkpoint import identify, resolve_model_dir
from training import checkpoints, rewards
from training.console import main_guard
from training.data import read_rows
from training.metrics import TrainerMetrics
from training.saving import saving
from training.supervised import load_model


@dataclass(frozen=True)
class Options:
    """Options of reward-model training."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name; other layouts of
    `training.layouts` too."""
    output: Path
    """Directory for the reward model, its metrics and their curves."""
    held_out: str | None = None
    """Pairs to try the reward on after each pass, such as `training.prepare` sets aside."""
    kind: Literal["implicit", "scalar"] = "implicit"
    """Which reward; see above."""
    beta: float = 0.1
    """β of the implicit reward."""
    epochs: float = 1.0
    """Passes over the data."""
    max_rows: int | None = None
    """Only the first so many pairs."""
    batch_size: int = 32
    """Pairs in a batch."""
    learning_rate: float = 2e-4
    """Peak of the linear schedule. 2e-4 suits a small model; use about 1e-6 for a pretrained LLM."""
    max_length: int = 1024
    """Longer sequences, in tokens, are truncated by trl."""
    bf16: bool = True
    """Compute in bfloat16; weights and their updates stay in float32."""
    save_every: int = 500
    """Steps between two checkpoints that `--resume` can go on from."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory, if there is one."""
    seed: int = 0
    """Of the order of the data."""


def main(options: Options) -> None:
    data = _pairs(options.preferences, options.max_rows)
    held_out = _pairs(options.held_out) if options.held_out else None
    base = identify(options.model)
    model, tokenizer = load_model(str(resolve_model_dir(options.model)))
    common: dict[str, Any] = dict(
        **checkpoints.arguments(options.output, options.save_every),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="epoch" if held_out else "no",
        learning_rate=options.learning_rate,
        max_length=options.max_length,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        seed=options.seed,
        report_to="none",
        logging_first_step=True,
    )
    trainer: Any
    callbacks = [TrainerMetrics(options.output)]
    if options.kind == "implicit":
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(beta=options.beta, **common),
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    else:
        torch.manual_seed(options.seed)  # of the new head
        scorer = AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=1, dtype=torch.float32
        )
        trainer = RewardTrainer(
            model=scorer,
            args=RewardConfig(**common),
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    checkpoints.train(trainer, options)
    config = rewards.RewardConfig(kind=options.kind, beta=options.beta, base=base)
    if trainer.is_world_process_zero():
        with saving(options.output) as directory:
            trainer.model.to(torch.bfloat16).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            rewards.write_reward_config(directory, config)
        checkpoints.remove(options.output)


def _pairs(source: str, max_rows: int | None = None) -> Dataset:
    fields = ("prompt", "chosen", "rejected")
    rows = read_rows(source, fields)[:max_rows]
    return Dataset.from_list([{field: row[field] for field in fields} for row in rows])


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
