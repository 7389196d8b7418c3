"""One proxy that is learned while serving: its sources, its directory, and the outcome of its last pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from judge.feedback import Source
from server.proxies import OWNER

STATE_FILE = "learned.json"


@dataclass(frozen=True)
class Spec:
    """An entry of --learn: a name and the sources of its verdicts."""

    name: str
    sources: tuple[Source, ...]
    own: bool = False
    """A proxy for each key, learned from its own choices."""
    shadow: bool = False
    """New versions score tokens and never act."""


class State(BaseModel):
    """The content of `learned.json`."""

    model_config = ConfigDict(extra="forbid")

    seen: int = 0
    """Number of rows in the database at the last pass."""
    live: str | None = None
    """The version that serves; of a key's own proxy only."""
    outcome: dict[str, Any] | None = None
    """Outcome of the last pass, as `training.learning.Outcome`, or its `error`."""


@dataclass(frozen=True)
class LearnedProxy:
    """The directory of a learned proxy: everybody's, or one key's own."""

    name: str
    root: Path
    owner: str | None = None
    """Hash of the key that owns it; None = everybody's."""

    @property
    def directory(self) -> Path:
        """Of its versions and its state."""
        return self.root / self.name / (self.owner or "")

    @property
    def served_name(self) -> str:
        """Its name in the worker. No request can name one with an owner."""
        return self.name if self.owner is None else f"{self.name}{OWNER}{self.owner}"

    def read(self) -> State:
        """The state; the initial one if the file is missing or damaged."""
        try:
            return State.model_validate_json((self.directory / STATE_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return State()

    def write(self, state: State) -> None:
        """Atomic: a reader sees the old state or the new one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{STATE_FILE}"
        temporary.write_text(state.model_dump_json())
        temporary.replace(self.directory / STATE_FILE)
