"""`reward.json`: what a reward model or judge on disk is, and which LLM it was trained from.

Training writes it beside the weights; rewards in training and `--judge` of the server read it.
"""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from proxy.checkpoint import BaseModelId

REWARD_FILE = "reward.json"


class RewardFile(BaseModel):
    """The content of `reward.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["implicit", "scalar", "judge"]
    beta: float = 0.0
    """β of the implicit reward; 0 for the other kinds."""
    base: BaseModelId
    """The model that it was trained from: π_ref of the implicit reward."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """
        Raises:
            OSError: the file cannot be read.
            ValidationError: its content is not that of `reward.json`.
        """
        return cls.model_validate_json((directory / REWARD_FILE).read_bytes())

    def write(self, directory: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        (directory / REWARD_FILE).write_text(text, encoding="utf-8")
