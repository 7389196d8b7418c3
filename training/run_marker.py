"""`assent_run.json`: what a command wrote into a directory, from which options and inputs.

Inputs are compared byte by byte. Exceptions: weights are compared by fingerprint; names of data sets and of models on
the hub are compared as names.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from proxy.checkpoint import fingerprint
from training.console import TrainingError

MARKER = "assent_run.json"


# Options that a resumed run may change: they change no result.
_FREE = (
    *("output", "work", "resume", "overwrite", "save_every"),
    *("servers", "proxy_root", "server_requests", "cache"),
    *("strict", "max_skipped"),
    *("report_to", "push_to_hub", "hub_private_repo"),
)


# Files that count as the content of an input directory, of a model (without its weights) or of a data set.
_READ = (
    *("*.json", "*.jinja", "*.txt", "*.model"),
    *("*.jsonl", "*.parquet", "*.csv", "*.arrow", "data/*"),
)


class Marker(BaseModel):
    """The content of `assent_run.json`."""

    model_config = ConfigDict(extra="forbid")

    command: str
    options: dict[str, Any]
    inputs: dict[str, str]
    """A digest of each input."""
    files: list[str]
    """Names and patterns of the files that the run writes, below the directory; in a finished run, the files that it
    wrote.
    """
    finished: bool = False


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def settings_of(options: Any, reads: Sequence[str]) -> dict[str, Any]:
    """The options that a resumed run must repeat, as JSON. Inputs are not among them: they are compared by content."""
    settings = json.loads(json.dumps(asdict(options), default=str))
    return {name: value for name, value in settings.items() if name not in (*_FREE, *reads)}


def digest_of(value: Any) -> str:
    """A digest of the content of an input."""
    digest = hashlib.sha256()
    for entry in paths_of(value):
        path = Path(entry)
        if path.is_file():
            _add_file(digest, path)
        elif path.is_dir():
            if any(path.glob("*.safetensors")):
                digest.update(fingerprint(path).encode())
            for file in sorted({file for pattern in _READ for file in path.glob(pattern)}):
                if file.is_file() and file.name != MARKER:
                    digest.update(file.name.encode())
                    _add_file(digest, file)
        else:
            digest.update(str(entry).encode())
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())


def paths_of(value: Any) -> list[str | Path]:
    """The paths of an option: none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, tuple) else [value]


def read_marker(directory: Path) -> Marker | None:
    """
    Raises:
        TrainingError: the marker is damaged.
    """
    path = directory / MARKER
    if not path.is_file():
        return None
    try:
        return Marker.model_validate_json(path.read_bytes())
    except ValidationError:
        raise TrainingError(
            f"{path} is damaged, so the content of {directory} is unknown: name another directory"
        ) from None


def write_marker(directory: Path, marker: Marker) -> None:
    write_whole(directory / MARKER, marker.model_dump_json(indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it exists as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
