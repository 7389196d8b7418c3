"""Reads the Dockerfile beside it, as far as that one goes: one stage, no escapes but line ends."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("Dockerfile")


class Step(NamedTuple):
    """An instruction such as `RUN --mount=... make`, without its flags."""

    name: str
    argument: str

    def words(self) -> list[str]:
        """The argument in its exec form, else as a shell would split it."""
        if self.argument.startswith("["):
            return [str(word) for word in json.loads(self.argument)]
        return shlex.split(self.argument)


def read(file: Path = FILE) -> list[Step]:
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    steps = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, argument = line.strip().partition(" ")
        while argument.lstrip().startswith("--"):
            _, _, argument = argument.lstrip().partition(" ")
        if name:
            steps.append(Step(name, argument.strip()))
    return steps


def health_command(steps: list[Step]) -> list[str]:
    """Of HEALTHCHECK CMD [...]."""
    (check,) = (step for step in steps if step.name == "HEALTHCHECK")
    return Step("CMD", check.argument.removeprefix("CMD").strip()).words()
