"""Train a reward model on preference pairs, with trl.

    python -m training.reward_model --model runs/base --preferences preferences.jsonl --output runs/reward

`--kind implicit` (the default) trains a copy of the LLM with the Bradley–Terry (DPO) loss; its reward is
β·log(π_rm/π_ref). `--kind scalar` trains the LLM's body with one linear head, as RLHF has it. In small models the
implicit reward sees relations (the wrong object, the wrong fact) that the scalar head does not.

All weights are trained in float32, which takes 16 bytes each with their gradients and AdamW's moments, and the copy
that stays 4 more. `--lora-rank 16` trains a LoRA on the LLM in bfloat16 instead: 2 bytes a weight. Its implicit reward
needs no second model where it is used either: π_ref is the LLM with the adapter off.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from proxy.checkpoint import identify, resolve_model_dir
from training import rewards
from training.console import TrainingError, main_guard
from training.data import read_rows
from training.supervised import (
    Conversations,
    MetricsWriter,
    attention_of,
    context_of,
    end_ids,
    load_model,
)


@dataclass(frozen=True)
class Options:
    """Options of reward-model training."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name; other layouts of
    `training.layouts` too."""
    output: Path
    """Directory for the reward model and `metrics.jsonl`."""
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
    """Peak of the linear schedule. 2e-4 suits a small model; use about 1e-6 for a pretrained LLM, 1e-5 with
    `lora_rank`."""
    gradient_accumulation: int = 1
    """Batches before an update."""
    lora_rank: int = 0
    """Rank of a LoRA on all linear layers, to be trained in the place of the weights (implicit only); 0 = none."""
    gradient_checkpointing: bool = False
    """Keep no activations but compute them again: a third slower, and much less memory."""
    max_length: int = 1024
    """Longer sequences, in tokens, are truncated by trl (scalar: left out)."""
    bf16: bool = True
    """Compute in bfloat16; weights and their updates stay in float32."""
    seed: int = 0
    """Of the order of the data."""


def main(options: Options) -> None:
    rows = read_rows(options.preferences, ("prompt", "chosen", "rejected"))[: options.max_rows]
    fields = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{field: row[field] for field in fields} for row in rows])
    if options.lora_rank and options.kind == "scalar":
        raise TrainingError("--lora-rank is for the implicit reward: the scalar one has no LoRA")
    base, directory = identify(options.model), str(resolve_model_dir(options.model))
    model, tokenizer = load_model(
        directory, dtype=torch.bfloat16 if options.lora_rank else torch.float32
    )
    Conversations(tokenizer), end_ids(model, tokenizer)  # trl's own errors say less
    common: dict[str, Any] = dict(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=options.learning_rate,
        max_length=min(options.max_length, context_of(model)),
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        save_strategy="no",
        report_to="none",
    )
    trainer: Any
    callbacks = [MetricsWriter(options.output / "metrics.jsonl")]
    if options.kind == "implicit":
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(beta=options.beta, **common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=lora_config(options.lora_rank) if options.lora_rank else None,
        )
    else:
        del model  # the scorer has its body
        trainer = RewardTrainer(
            model=_scorer(directory),
            args=RewardConfig(**common),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.train()
    if not options.lora_rank:
        trainer.model.to(torch.bfloat16)
    trainer.model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    config = rewards.RewardConfig(kind=options.kind, beta=options.beta, base=base)
    rewards.write_reward_config(options.output, config)


def _scorer(directory: str) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=1,
            dtype=torch.float32,
            attn_implementation=attention_of(directory),
        )
    except ValueError as error:
        raise TrainingError(f"this model cannot have a scalar reward's head: {error}") from None


def lora_config(rank: int) -> LoraConfig:
    """On all linear layers but the head, with α = 2 · rank, as arXiv 2405.09673 recommends."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
