"""Where metrics go besides the run's own files: the trackers of `--report-to`.

TensorBoard's events are written beside the metrics; the others are accelerate's trackers, in a project or experiment
`assent` with the run named after its directory. Each tracker's own environment variables change that, as documented by
it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import tracking
from torch.utils.tensorboard import SummaryWriter

PROJECT = "assent"
EVENTS_DIRECTORY = "tensorboard"


class Trackers:
    """The trackers of a run, in its main process."""

    def __init__(
        self, names: Sequence[str], directory: Path, settings: dict[str, Any], after: int | None
    ) -> None:
        """
        Args:
            names: of `--report-to`.
            directory: of the run.
            settings: its options; nested ones are flattened.
            after: the last step that a resumed run keeps; None = a new run.
        """
        self._events: SummaryWriter | None = None
        if "tensorboard" in names:
            purge = None if after is None else after + 1
            self._events = SummaryWriter(str(directory / EVENTS_DIRECTORY), purge_step=purge)
        self._trackers = [_start(name, directory) for name in names if name != "tensorboard"]
        for tracker in self._trackers:
            tracker.store_init_configuration(_flat(settings))

    def add(self, row: dict[str, Any]) -> None:
        """Send a row of metrics."""
        step = row["step"]
        values = {
            name: value
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """No row can be added after this."""
        if self._events is not None:
            self._events.close()
        for tracker in self._trackers:
            tracker.finish()


def _start(name: str, directory: Path) -> Any:
    run = directory.resolve().name
    tracker: Any
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        tracker = tracking.WandBTracker(project, name=run)
    elif name == "trackio":
        tracker = tracking.TrackioTracker(PROJECT, name=run)
    else:
        tracker = tracking.MLflowTracker(experiment_name=PROJECT, run_name=run)
    tracker.start()
    return tracker


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            simple = value is None or isinstance(value, bool | int | float | str)
            found[prefix + name] = value if simple else str(value)
    return found
