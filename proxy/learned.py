"""Versions of a proxy that a server learns, on disk: `<root>/<version>/`, a checkpoint and its rows.

`rows.json` lists the rows of the feedback database that the version was trained on, with their callers, so
that a caller's rows can be forgotten.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.checkpoint import WEIGHTS_FILE, BaseModelId, save
from proxy.network import ProxyNetwork

ROWS_FILE = "rows.json"
MIN_VERDICTS = 10
"""A proxy is learned from at least so many: fewer leave nothing to test it on."""
KEPT = 3
"""Versions of a proxy that are kept beside the live one."""

Rows = Mapping[int, str | None]
"""Row -> its caller; None = unknown."""


def save_version(
    root: Path, network: ProxyNetwork, rows: Rows, *, base: BaseModelId, training: dict[str, Any]
) -> str:
    """Write a version, whole or not at all, and return its name."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".saving-"))
    try:
        version = save(temporary, network, base=base, training=training)
        (temporary / ROWS_FILE).write_text(json.dumps({"rows": [*rows.items()]}))
        temporary.chmod(0o755)
        if not (root / version).exists():
            temporary.rename(root / version)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return version


def rows_of(version: Path) -> Rows:
    """The rows that a version was trained on; empty if no server learned it."""
    try:
        return dict(json.loads((version / ROWS_FILE).read_text())["rows"])
    except FileNotFoundError:
        return {}


def versions(root: Path) -> list[Path]:
    """The directories of all versions, the newest first."""
    directories = [path.parent for path in root.glob(f"[!.]*/{WEIGHTS_FILE}")]
    return sorted(directories, key=lambda path: path.stat().st_mtime, reverse=True)


def prune(root: Path, live: Path | None) -> None:
    """Delete old versions, except the live one."""
    for path in versions(root)[KEPT:]:
        if path != live:
            shutil.rmtree(path)
