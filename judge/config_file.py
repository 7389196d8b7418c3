"""Options from a YAML file, `--config FILE`: keys are the options' names, and the command line wins.

model: runs/base
learning_rate: 1e-3         # or learning-rate
decoding:                   # or decoding.temperature: 0.8
  temperature: 0.8
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

FLAG = "--config"


class ConfigError(ValueError):
    """The file cannot be used; the message names it and the key."""


def with_config(options: type, arguments: Sequence[str]) -> list[str]:
    """The command line with the options of its `--config` file in front, so that what is given there wins.

    Args:
        options: the command's dataclass
        arguments: the command line

    Raises:
        ConfigError: the file is missing, is no YAML of options, or has an unknown one.
    """
    rest, paths = [], []
    words = iter(arguments)
    for word in words:
        if word == FLAG:
            paths.append(next(words, ""))
        elif word.startswith(f"{FLAG}="):
            paths.append(word.partition("=")[2])
        else:
            rest.append(word)
    if not paths:
        return rest
    if len(paths) > 1:
        raise ConfigError(f"{FLAG} is given {len(paths)} times: give one file")
    return [*_arguments(options, paths[0]), *rest]


def _arguments(options: type, path: str) -> Iterator[str]:
    where, known = f"{FLAG} {path}", dict(flags_of(options))
    for key, value in _settings(_read(path), where):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists all"
            raise ConfigError(f"{where}: there is no option {key}: {hint}")
        if isinstance(value, bool) and known[key] is bool:
            head, dot, last = key.rpartition(".")
            yield f"--{key}" if value else f"--{head}{dot}no-{last}"
        elif known[key] is bool:
            raise ConfigError(f"{where}: {key}: {value!r} is neither true nor false")
        elif isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        else:
            yield from (f"--{key}", str(value))


def _read(path: str) -> dict[Any, Any]:
    where = f"{FLAG} {path}"
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected options, one `name: value` a line")
    return content


def _settings(content: dict[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Option, as on the command line, and its value."""
    for name, value in content.items():
        key = prefix + str(name).replace("_", "-")
        if isinstance(value, dict):
            yield from _settings(value, where, f"{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            raise ConfigError(f"{where}: {key}: expected a value or a list of values")
        else:
            yield key, value


def flags_of(options: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each option of a dataclass as on the command line, nested ones with dots, and its type."""
    hints = get_type_hints(options)
    for field in fields(options):
        hint, key = hints[field.name], prefix + field.name.replace("_", "-")
        if is_dataclass(hint) and isinstance(hint, type):
            yield from flags_of(hint, f"{key}.")
        else:
            yield key, hint
