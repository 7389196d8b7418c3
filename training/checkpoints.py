"""Go on with a run of transformers' trainer that was killed.

The trainer writes `checkpoints/checkpoint-<steps>` in the output directory: weights, optimiser, random state, and
`trainer_state.json` last of all. One that was cut short is not looked at; the one before goes only when the next is
whole. The final weights are those of an unbroken run.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from training.metrics import METRICS_FILES, TrainerMetrics
from training.output import Run, remove
from training.saving import MODEL_FILES

_DIRECTORY = "checkpoints"
_CHECKPOINTS = f"{_DIRECTORY}/checkpoint-*"
PLAN_FILE, REFERENCE_FILE = f"{_DIRECTORY}/plan.json", f"{_DIRECTORY}/reference.safetensors"
"""What `training.memory` and `training.pair_trainer` keep for a run that goes on."""
_FILES = (_CHECKPOINTS, PLAN_FILE, REFERENCE_FILE)
WRITES = (*METRICS_FILES, *MODEL_FILES, *_FILES)
"""What such a run writes, as `training.output` wants to know it."""
_STATE_FILE = "trainer_state.json"


def arguments(output: Path, save_every: int) -> dict[str, Any]:
    """What transformers' `TrainingArguments` must know."""
    return dict(
        output_dir=str(output / _DIRECTORY),
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
    )


def train(trainer: Any, options: Any, run: Run) -> None:
    """Train, from the newest whole checkpoint with `options.resume`, else from nothing."""
    run.start()
    newest = newest_checkpoint(options.output) if options.resume else None
    if options.resume:
        print(f"going on from {newest}" if newest else "nothing to resume: beginning anew")
    if trainer.is_world_process_zero():  # those cut short would be taken for the newest
        cut_short = set(options.output.glob(_CHECKPOINTS)) - {newest}
        remove(options.output, [str(path.relative_to(options.output)) for path in cut_short])
    if newest:
        run.saved = f"step {_steps(newest)}"
    trainer.add_callback(_Saved(run))
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TrainerMetrics):
                callback.close()


def remove_all(output: Path) -> None:
    """What a run that is done needs no more."""
    remove(output, _FILES)


def newest_checkpoint(output: Path) -> Path | None:
    """The newest that is whole; None = there is none."""
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


class _Saved(TrainerCallback):
    """Keeps in mind what a run that is interrupted can go on from."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.saved = f"step {state.global_step}"
