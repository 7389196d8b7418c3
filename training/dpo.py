"""Direct preference optimisation (arXiv 2305.18290), with trl: the baseline that trains all of the LLM's weights.

python -m training.dpo --model runs/base --preferences preferences.jsonl --output runs/dpo
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from proxy.checkpoint import resolve_model_dir
from training.console import main_guard
from training.data import read_rows
from training.supervised import MetricsWriter, load_model

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of training on preference pairs."""

    model: str
    """The LLM to start from: a directory or a hub id."""
    preferences: str
    """JSON lines or Parquet of `prompt`, `chosen` and `rejected`, or a data set's name; other layouts of
    `training.layouts` too."""
    output: Path
    """Directory for the model and `metrics.jsonl`."""
    beta: float = 0.1
    """β: the higher, the nearer to the start."""
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
    seed: int = 0
    """Of the order of the data."""


def main(options: Options) -> None:
    rows = read_rows(options.preferences, FIELDS)[: options.max_rows]
    model, tokenizer = load_model(str(resolve_model_dir(options.model)))
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(options.output),
            beta=options.beta,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            max_length=options.max_length,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            seed=options.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{field: row[field] for field in FIELDS} for row in rows]),
        processing_class=tokenizer,
        callbacks=[MetricsWriter(options.output / "metrics.jsonl")],
    )
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    with main_guard():
        main(tyro.cli(Options, description=__doc__))
