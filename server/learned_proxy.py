"""A proxy that is learned while serving: what it learns from, where it is, and what came of the last pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from judge.feedback import Source
from server.proxies import OWNER

STATE_FILE = "learned.json"


@dataclass(frozen=True)
class Spec:
    """What a name learns from."""

    name: str
    sources: tuple[Source, ...]
    own: bool = False
    """A proxy for each key, of its choices alone."""
    shadow: bool = False
    """New versions score what is said, and never act."""


class State(BaseModel):
    """What `learned.json` says."""

    model_config = ConfigDict(extra="forbid")

    seen: int = 0
    """Rows in the database at the last pass."""
    live: str | None = None
    """Of a key's own proxy: the version that serves."""
    outcome: dict[str, Any] | None = None
    """Of the last pass, as `training.learning.Outcome`; or `error`."""


@dataclass(frozen=True)
class LearnedProxy:
    """One proxy that is learned: everybody's, or one key's own."""

    name: str
    root: Path
    owner: str | None = None
    """A hash of whose own it is."""

    @property
    def directory(self) -> Path:
        return self.root / self.name / (self.owner or "")

    @property
    def served_name(self) -> str:
        """By which the worker knows it. No request can name one with an owner."""
        return self.name if self.owner is None else f"{self.name}{OWNER}{self.owner}"

    def read(self) -> State:
        try:
            return State.model_validate_json((self.directory / STATE_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return State()

    def write(self, state: State) -> None:
        """Whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{STATE_FILE}"
        temporary.write_text(state.model_dump_json())
        temporary.replace(self.directory / STATE_FILE)
