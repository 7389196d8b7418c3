"""`--push-to-hub`: uploads a finished run's checkpoint and model card to the Hub.

What only `--resume` needs stays here: states, recorded positions, samples, TensorBoard's events. A failed upload loses
nothing: the checkpoint is on the disk, and the same command with `--resume` uploads it again.
"""

import logging
import shlex
from typing import Any

from training.console import TrainingError
from training.metrics import CURVES_FILE, METRICS_FILE
from training.model_card import CARD_FILE
from training.output import Run
from training.run_marker import MARKER

FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"),
    *(CARD_FILE, METRICS_FILE, CURVES_FILE),
)
_ONLY_HERE = (MARKER, "training_state.safetensors", "*/*", ".*")


def publish(run: Run, options: Any) -> None:
    """Upload the result of a finished run, if the options say so; in its main process only.

    Raises:
        TrainingError: the upload failed; the message says how to do it by hand.
    """
    repo = options.push_to_hub
    if repo is None or not run.is_main:
        return
    from huggingface_hub import HfApi

    api = HfApi()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        url = api.create_repo(repo, private=options.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=run.directory,
            allow_patterns=[*FILES],
            ignore_patterns=[*_ONLY_HERE],
            commit_message=f"Upload what {run.command} made",
        )
    except Exception as error:  # of HTTP, of the Hub, of its transfer library: many kinds
        raise TrainingError(
            f"{repo}: the upload failed ({str(error).strip().partition(chr(10))[0]}); nothing is lost, all of it is in "
            f"{run.directory}: upload it with `{by_hand(repo, run)}`"
        ) from error
    print(f"{run.directory}: uploaded to {url}")


def by_hand(repo: str, run: Run) -> str:
    """The command that uploads the same files."""
    words = ["hf", "upload", repo, str(run.directory), "."]
    for option, patterns in (("--include", FILES), ("--exclude", _ONLY_HERE)):
        for pattern in patterns:
            words += [option, pattern]
    return shlex.join(words)
