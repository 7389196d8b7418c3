"""Resume a run of transformers' trainer that was killed.

The trainer writes `checkpoints/checkpoint-<steps>` in the output directory: weights, optimiser, random state and, last
of all, `trainer_state.json`. A checkpoint that was cut short is ignored; the previous one is removed only when the next
one is complete. The final weights equal those of an uninterrupted run.
"""

import json
from pathlib import Path
from typing import Any

from training.metrics import METRICS_FILES, TrainerMetrics
from training.model_card import CARD_FILE
from training.output import Run, remove
from training.saving import MODEL_FILES

_DIRECTORY = "checkpoints"
_CHECKPOINTS = f"{_DIRECTORY}/checkpoint-*"
PLAN_FILE, REFERENCE_FILE = f"{_DIRECTORY}/plan.json", f"{_DIRECTORY}/reference.safetensors"
"""Kept by `training.memory` and `training.pair_trainer` for a run that is resumed."""
_FILES = (_CHECKPOINTS, PLAN_FILE, REFERENCE_FILE)
WRITES = (*METRICS_FILES, *MODEL_FILES, *_FILES, CARD_FILE)
"""The files of such a run, as `training.output` expects them."""
_STATE_FILE = "trainer_state.json"


def arguments(output: Path, save_every: int) -> dict[str, Any]:
    """The arguments of transformers' `TrainingArguments` for checkpoints."""
    return dict(
        output_dir=str(output / _DIRECTORY),
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
    )


def train(trainer: Any, options: Any, run: Run) -> None:
    """Train, from the newest complete checkpoint with `options.resume`, else from the start."""
    run.start()
    newest = newest_checkpoint(options.output) if options.resume else None
    if options.resume:
        print(f"resuming from {newest}" if newest else "nothing to resume: starting anew")
    if trainer.is_world_process_zero():  # transformers would take an incomplete one for the newest
        cut_short = set(options.output.glob(_CHECKPOINTS)) - {newest}
        remove(options.output, [str(path.relative_to(options.output)) for path in cut_short])
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        if last := newest_checkpoint(options.output):
            run.saved = f"step {_steps(last)}"
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TrainerMetrics):
                callback.close()


def remove_all(output: Path) -> None:
    """Remove the files that a finished run no longer needs."""
    remove(output, _FILES)


def newest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    whole = [path for path in output.glob(_CHECKPOINTS) if _is_whole(path)]
    return max(whole, key=_steps, default=None)


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
