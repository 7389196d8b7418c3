"""A run's metrics: `metrics.jsonl`, the trackers of `--report-to`, and a picture of the curves at the end.

`docs/metrics.md` defines each metric.
"""

import json
import math
from pathlib import Path
from typing import Any, Self

from matplotlib.figure import Figure
from transformers import TrainerCallback

from training.output import remove
from training.run_marker import settings_of, write_whole
from training.trackers import EVENTS_DIRECTORY, Trackers

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
_EVENTS = f"{EVENTS_DIRECTORY}/events.out.tfevents.*"
METRICS_FILES = (METRICS_FILE, CURVES_FILE, _EVENTS)
"""Files of a run's metrics, as `training.output` expects them."""


class Metrics:
    """Rows of metrics, each with its `step`; a context manager that draws the curves at the end."""

    def __init__(self, options: Any, *, after: int | None = None) -> None:
        """
        Args:
            options: of the run, with its `output` and `report_to`.
            after: keep an earlier run's rows up to this step; None = start anew.
        """
        directory: Path = options.output
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.rows = [row for row in read_metrics(directory) if row["step"] <= (after or 0)]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_whole(directory / METRICS_FILE, text)
        self._file = (directory / METRICS_FILE).open("a", encoding="utf-8")
        if after is None:
            remove(directory, [_EVENTS])
        self._trackers = Trackers(options.report_to, directory, settings_of(options, ()), after)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Draw the curves; no row can be added after this."""
        self._file.close()
        self._trackers.close()
        if self.rows:
            draw_curves(self.rows, self._directory / CURVES_FILE)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row immediately."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._trackers.add(row)


class TrainerMetrics(TrainerCallback):
    """Passes the logs of transformers' trainer to `Metrics`, in the main process."""

    def __init__(self, options: Any) -> None:
        self._options = options
        self._metrics: Metrics | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._metrics = Metrics(self._options, after=state.global_step or None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if self._metrics:
            self._metrics.add({"step": state.global_step, **logs})

    def close(self) -> None:
        """Draw the curves; the trainer does not do it if a run is interrupted."""
        if self._metrics:
            self._metrics.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run, without a last line that a crash cut short."""
    path = directory / METRICS_FILE
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every metric over the steps, each in a field of its own. Metrics of the last row only, the run's summary,
    are left out.
    """
    named = rows[:-1] or rows
    names = sorted({name for row in named for name, value in row.items() if _is_number(value)})
    names.remove("step")
    columns = min(4, len(names))
    height = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * height))
    fields = figure.subplots(height, columns, squeeze=False)
    # By hand: an automatic layout triples the time.
    figure.subplots_adjust(
        left=0.18 / columns, right=1 - 0.03 / columns, bottom=0.16 / height, top=1 - 0.15 / height,
        wspace=0.3, hspace=0.45,
    )  # fmt: skip
    for field in fields.flat[len(names) :]:
        field.set_axis_off()
    for field, name in zip(fields.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
        field.plot(
            *zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 30 else None
        )
        field.set_title(name, fontsize=9)
        field.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
