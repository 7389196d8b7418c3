"""The peers' packages, each in a virtual environment of its own, and what setting it up takes."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.setting import PeerName


@dataclass(frozen=True)
class Package:
    """What pip is asked for."""

    module: str
    requirements: tuple[str, ...]
    """One call of pip for each. A torch that is there already is not replaced by a CUDA build."""


PACKAGES: dict[PeerName, Package] = {
    "optillm": Package("optillm", ("torch==2.13.0", "optillm==0.4.0")),
    "its_hub": Package("its_hub", ("its_hub[lm]==1.2.0",)),
}

RECORD = "setup.json"
"""What setting it up took, in the environment."""


def python_of(environment: Path) -> Path:
    return environment.absolute() / "bin" / "python"


def find(name: PeerName, environment: Path) -> dict[str, Any] | None:
    """Its size, if it has the package, and the seconds that it took if it was made here."""
    if not (
        python_of(environment).exists() and any(environment.glob(f"lib/*/site-packages/{name}"))
    ):
        return None
    record = environment / RECORD
    if record.exists():
        return json.loads(record.read_text())
    return {"megabytes": megabytes(environment)}


def make(name: PeerName, environment: Path, log: Path) -> dict[str, Any]:
    """Install the package; seconds and size of that.

    Raises:
        subprocess.CalledProcessError: pip failed; the log says why.
    """
    start = time.monotonic()
    with log.open("w") as file:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            *(
                [str(python_of(environment)), "-m", "pip", "install", requirement]
                for requirement in PACKAGES[name].requirements
            ),
        ):
            subprocess.run(command, stdout=file, stderr=file, check=True)
    made = {"seconds": time.monotonic() - start, "megabytes": megabytes(environment)}
    (environment / RECORD).write_text(json.dumps(made) + "\n")
    return made


def megabytes(directory: Path) -> float:
    """Of the files in a directory, links aside."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files) / 1e6
