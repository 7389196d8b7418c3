"""Options of every training that writes a checkpoint: where its metrics go, and whether it is published."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from training.console import TrainingError
from training.data import RowOptions

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class RunOptions(RowOptions):
    """Where a run's metrics and its result go."""

    report_to: tuple[Tracker, ...] = ("tensorboard",)
    """Where metrics go, besides `metrics.jsonl` and `curves.png`: one or several."""
    push_to_hub: str | None = None
    """Upload the finished checkpoint and its model card to this repository of the Hub, `org/repo`. The token is that of
    `hf auth login` or HF_TOKEN.
    """
    hub_private_repo: bool = True
    """Whether a repository that does not exist yet is created as a private one."""


def refuse_unreportable(options: Any) -> None:
    """
    Raises:
        TrainingError: a tracker is not installed, or there is no token to upload with. Better now than after hours.
    """
    missing = [name for name in getattr(options, "report_to", ()) if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise TrainingError(f"--report-to {names}: not installed: pip install {names}")
    repo = getattr(options, "push_to_hub", None)
    if repo is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise TrainingError(f"--push-to-hub {repo}: {error}") from None
    if get_token() is None:
        raise TrainingError(
            f"--push-to-hub {repo}: there is no token for the Hub: set HF_TOKEN, or run `hf auth login`"
        )
