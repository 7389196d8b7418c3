"""`--push-to-hub`: uploads a finished run's checkpoint and model card to the Hub.

Only files that the run wrote are uploaded, and not what only `--resume` needs: states, recorded positions, samples. A
failed upload loses nothing: the checkpoint is on the disk, and the same command with `--resume` uploads it again.
"""

import logging
import shlex
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from training.console import TrainingError
from training.metrics import CURVES_FILE, METRICS_FILE
from training.model_card import CARD_FILE
from training.output import Run
from training.run_marker import MARKER, read_marker
from training.state import STATE_FILE
from training.trackers import EVENTS_DIRECTORY

_UPLOADED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"),
    *(CARD_FILE, METRICS_FILE, CURVES_FILE, f"{EVENTS_DIRECTORY}/*"),
)


def publish(run: Run, options: Any) -> None:
    """Upload the result of a finished run, if the options say so; in its main process only.

    Raises:
        TrainingError: the upload failed; the message says how to do it by hand.
    """
    repo = options.push_to_hub
    if repo is None or not run.is_main:
        return
    from huggingface_hub import HfApi

    api, files = HfApi(), files_to_upload(run.directory)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        url = api.create_repo(repo, private=options.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run.directory,
            allow_patterns=[escape(name) for name in files],
            commit_message=f"Upload what {run.command} made",
        )
    except Exception as error:  # of HTTP, of the Hub, of its transfer library: many kinds
        raise TrainingError(
            f"{repo}: the upload failed ({str(error).strip().partition(chr(10))[0]}); nothing is lost, all of it is in "
            f"{run.directory}: upload it with `{by_hand(repo, run.directory, files)}`"
        ) from error
    print(f"{run.directory}: uploaded to {url}")


def files_to_upload(directory: Path) -> list[str]:
    """Names of the files of a finished run that others need, below its directory."""
    marker = read_marker(directory)
    assert marker is not None, "the run is finished"
    written = {path for name in marker.files for path in directory.glob(name)}
    wanted = {path for pattern in _UPLOADED for path in directory.glob(pattern)}
    names = {str(path.relative_to(directory)) for path in written & wanted}
    return sorted(names - {MARKER, STATE_FILE})


def by_hand(repo: str, directory: Path, files: Sequence[str]) -> str:
    """The command that uploads the same files."""
    included = (word for name in files for word in ("--include", name))
    return shlex.join(["hf", "upload", repo, str(directory), ".", *included])
