"""What every training command does at its edge: options are read and checked; errors of the user's become one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from judge.principles import PrincipleError
from judge.prompts import JudgePromptError
from proxy.checkpoint import ProxyError

OptionsT = TypeVar("OptionsT")


class TrainingError(ValueError):
    """Something that the user can mend; the message says what, where and how."""


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C; the message says what was saved, and how to go on."""


def read_options(options: type[OptionsT], description: str | None) -> OptionsT:
    """The command line as a dataclass: `~` is expanded, and numbers are within the bounds of their fields.

    Raises:
        TrainingError: a number is out of its bounds.
    """
    found = _at_home(tyro.cli(options, description=description))
    try:
        TypeAdapter(options).validate_python(asdict(found))
    except ValidationError as error:
        problem = error.errors()[0]
        flag = ".".join(str(part).replace("_", "-") for part in problem["loc"])
        raise TrainingError(f"--{flag} {problem['input']}: {problem['msg']}") from None
    return found


def _at_home(value: Any) -> Any:
    """With the home directory in the place of a leading `~`, which a shell leaves where it stands after `=`."""
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(Path(value).expanduser())
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        return replace(value, **{name: _at_home(getattr(value, name)) for name in names})
    return value


@contextmanager
def main_guard() -> Iterator[None]:
    """Turn errors that the user can mend into a line and exit code 2, Ctrl-C into one and 130; let others through."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        line = str(interrupt) if isinstance(interrupt, Interrupted) else "interrupted"
        print(f"\n{line}" if line else "", file=sys.stderr)
        sys.exit(130)
    except (TrainingError, ProxyError, JudgePromptError, PrincipleError) as error:
        _end(str(error))
    except OSError as error:
        # `strerror` is missing where a library raises its own.
        _end(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SafetensorError as error:  # which a full disk raises too
        _end(f"safetensors: {error}")


def _end(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
