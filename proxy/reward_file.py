"""`reward.json`: what a reward model or judge on disk is, and which LLM it was trained from.

Training writes it beside the weights; rewards in training and `--judge` of the server read it.
"""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from proxy.checkpoint import BaseModelId

REWARD_FILE = "reward.json"


class ProbeInfo(BaseModel):
    """What a probe reads, and what it was worth when it was trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    """It reads the hidden states after so many of the LLM's layers; after the last, those that the LLM's head reads."""
    num_layers: int
    """Of the LLM. A server reads the last one's states only."""
    end_ids: list[int]
    """Tokens that end a response: none after the first of them is read."""
    training: dict[str, float]
    """Figures of the training; shares have their standard errors beside them."""


class RewardFile(BaseModel):
    """The content of `reward.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["implicit", "scalar", "judge", "probe"]
    beta: float = 0.0
    """β of the implicit reward; 0 for the other kinds."""
    base: BaseModelId
    """The model that it was trained from: π_ref of the implicit reward."""
    probe: ProbeInfo | None = None
    """Of a probe only."""

    @model_validator(mode="after")
    def _describes_a_probe(self) -> Self:
        if (self.kind == "probe") != (self.probe is not None):
            raise ValueError("kind `probe` and its description go together")
        return self

    @classmethod
    def read(cls, directory: Path) -> Self:
        """
        Raises:
            OSError: the file cannot be read.
            ValidationError: its content is not that of `reward.json`.
        """
        return cls.model_validate_json((directory / REWARD_FILE).read_bytes())

    def write(self, directory: Path) -> None:
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
        (directory / REWARD_FILE).write_text(text, encoding="utf-8")
