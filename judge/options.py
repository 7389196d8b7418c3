"""Options of commands, one dataclass each: types with bounds, and reading a command line into one."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from judge.config_file import FLAG, ConfigError, with_config

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that all generators accept

OptionsT = TypeVar("OptionsT")


class OptionError(ValueError):
    """An option is invalid, such as a number out of its bounds; the message names it."""


def read_options(options: type[OptionsT], description: str | None) -> OptionsT:
    """The command line, and the file of its `--config`, as a dataclass, with `~` expanded.

    Raises:
        OptionError: a number is out of the bounds of its field, or the file cannot be used.
    """
    try:
        arguments = with_config(options, sys.argv[1:])
    except ConfigError as error:
        raise OptionError(str(error)) from None
    parsed = _expand_home(tyro.cli(options, args=arguments, description=_with_hint(description)))
    try:
        TypeAdapter(options).validate_python(asdict(parsed))
    except ValidationError as error:
        problem = error.errors()[0]
        flag = ".".join(str(part).replace("_", "-") for part in problem["loc"])
        raise OptionError(f"--{flag} {problem['input']}: {problem['msg']}") from None
    return parsed


def _with_hint(description: str | None) -> str:
    return f"{description or ''}\n\n{FLAG} FILE reads options from a YAML file; those of the command line win."


def refuse_existing(directory: Path, names: Iterable[str], source: str, *, overwrite: bool) -> None:
    """
    Raises:
        OptionError: the command must not write files of these names there: they exist and `overwrite` is not set, one
            of them is the source that the command reads, or `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise OptionError(f"{directory} is a file, and must be a directory")
    for path in [directory / name for name in names]:
        if path.resolve() == Path(source).resolve():
            raise OptionError(f"{path} is the input: name another --output")
        if path.exists() and not overwrite:
            raise OptionError(
                f"{path} is there already: name another --output, or replace it with --overwrite"
            )


def _expand_home(value: Any) -> Any:
    """With a leading `~` expanded, which a shell does not do after `=`."""
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(Path(value).expanduser())
    if isinstance(value, tuple):
        return tuple(map(_expand_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        return replace(value, **{name: _expand_home(getattr(value, name)) for name in names})
    return value
