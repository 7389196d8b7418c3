"""Principles to judge by: one template each, from a TOML, YAML or JSON file.

    [honesty]
    system = "Choose the response that claims nothing it cannot know."

The directory of a model that was trained to judge has the principles of its training, `principles.json`.
"""

import json
import string
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

FILE_NAME = "principles.json"
SLOTS = ("conversation", "response_a", "response_b")


class PrincipleError(ValueError):
    """A file of principles cannot be used; the message names the file, the principle and the field."""


class Principle(BaseModel):
    """The judge prompt's three messages: the model continues the third with " A" or " B"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str = Field(min_length=1)
    """What to judge by."""
    question: str = (
        "[Conversation]\n{conversation}\n[Response A]\n{response_a}\n[Response B]\n{response_b}"
    )
    """The texts to judge. The text that both orders share comes first, so that a prefix cache can serve it."""
    answer: str = Field("The better response is", min_length=1)
    """The beginning of the answer."""

    @property
    def headings(self) -> list[str]:
        """The lines of the question that are around the texts, such as `[Response A]`."""
        parts = [literal for literal, *_ in string.Formatter().parse(self.question)]
        return [line.strip() for part in parts for line in part.splitlines() if line.strip()]

    @field_validator("question")
    @classmethod
    def _has_each_slot_once(cls, template: str) -> str:
        try:
            slots = [
                name for _, name, _, _ in string.Formatter().parse(template) if name is not None
            ]
        except ValueError as error:
            raise ValueError(f"is no template: {error}; write {{{{ for a brace") from None
        if sorted(slots) != sorted(SLOTS):
            raise ValueError(
                "must have each of {conversation}, {response_a} and {response_b} once, and no other slot"
            )
        return template


DEFAULT: Mapping[str, Principle] = {
    "overall": Principle(
        system="Choose the better response: relevant, true to the conversation, safe, polite, complete."
    )
}


def read_principles(path: Path) -> dict[str, Principle]:
    """The principles of a file by name, in its order; the first is the default.

    Raises:
        PrincipleError: the file is missing or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content: Any = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise PrincipleError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise PrincipleError(
            f"{path}: must have one table per principle, with its `system` message"
        )
    principles = {}
    for name, fields in content.items():
        try:
            principles[str(name)] = Principle.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            raise PrincipleError(f"{path}: {where}: {first['msg']}") from None
    return principles


def write_principles(path: Path, principles: Mapping[str, Principle]) -> None:
    """Write them as JSON, without fields that have their default."""
    content = {
        name: principle.model_dump(exclude_defaults=True) for name, principle in principles.items()
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def principles_of(model: Path) -> Mapping[str, Principle]:
    """The principles that a model was trained with; `DEFAULT` where its directory has none.

    Raises:
        PrincipleError: its file is damaged.
    """
    path = model / FILE_NAME
    return read_principles(path) if path.is_file() else DEFAULT
