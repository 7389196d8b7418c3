"""Go on with a run of transformers' trainer (and so trl's) that was killed.

The trainer writes `checkpoints/checkpoint-<steps>` in the output directory: weights, optimiser, random state, and
`trainer_state.json` last of all. One that was cut short is not looked at; the one before goes only when the next is
whole. The final weights are those of an unbroken run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from training.state import refuse_other_settings, settings_of

_DIRECTORY = "checkpoints"
_OPTIONS_FILE = "options.json"
_STATE_FILE = "trainer_state.json"


def arguments(output: Path, save_every: int) -> dict[str, Any]:
    """What transformers' `TrainingArguments` must know."""
    return dict(
        output_dir=str(output / _DIRECTORY),
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
    )


def train(trainer: Any, options: Any) -> None:
    """Train, from the newest whole checkpoint with `options.resume`, else from nothing.

    Raises:
        TrainingError: the checkpoint is of a run with other options.
    """
    settings = settings_of(options)
    newest = newest_checkpoint(options.output, settings) if options.resume else None
    if options.resume:
        print(f"going on from {newest}" if newest else "nothing to resume: beginning anew")
    if trainer.is_world_process_zero():
        directory = options.output / _DIRECTORY
        for path in directory.glob("*"):  # those cut short would be taken for the newest
            if path.is_dir() and path != newest:
                shutil.rmtree(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _OPTIONS_FILE).write_text(json.dumps(settings), encoding="utf-8")
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def remove(output: Path) -> None:
    """What a run that is done needs no more."""
    shutil.rmtree(output / _DIRECTORY)


def newest_checkpoint(output: Path, settings: dict[str, Any]) -> Path | None:
    """The newest that is whole, of a run with these settings; None = there is none.

    Raises:
        TrainingError: it is of a run with other settings.
    """
    directory = output / _DIRECTORY
    whole = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest is None:
        return None
    before = json.loads((directory / _OPTIONS_FILE).read_text(encoding="utf-8"))
    refuse_other_settings(newest, before, settings)
    return newest


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
