"""Bounds of all commands' numbers, and `~`."""

import importlib
import math
import pkgutil
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

import judge
import training
from judge.options import OptionError, Positive, read_options
from training import dpo, learner, proxy_ppo, sft
from training.policy import Decoding


def commands() -> list[ModuleType]:
    """All modules that a user runs with `python -m`."""
    names = [
        f"{package.__name__}.{info.name}"
        for package in (training, judge)
        for info in pkgutil.iter_modules(package.__path__)
    ]
    modules = [importlib.import_module(name) for name in (*names, "training.world.__main__")]
    return [
        module
        for module in modules
        if '__name__ == "__main__"' in Path(str(module.__file__)).read_text()
        and module is not learner  # which the server starts, and talks to
    ]


@pytest.mark.parametrize("command", commands(), ids=lambda module: module.__name__)
def test_every_number_has_bounds(command: ModuleType) -> None:
    """At the least, none may be NaN or infinite, and no count may be negative."""
    for options in (command.Options, Decoding):
        for name, hint in get_type_hints(options, include_extras=True).items():
            base_type = get_type_hints(options)[name]
            if base_type in (float, float | None):
                invalid: Any = math.nan
            elif base_type in (int, int | None):
                invalid = -1
            else:
                continue
            with pytest.raises(ValidationError):
                TypeAdapter(hint).validate_python(invalid)


@pytest.mark.parametrize("command", commands(), ids=lambda module: module.__name__)
def test_every_command_reads_its_options_here(command: ModuleType) -> None:
    assert "main(read_options(Options, __doc__))" in Path(str(command.__file__)).read_text()


SFT = ("--model", "m", "--sft", "s", "--output", "o")
PPO = ("--model", "m", "--reward", "r", "--prompts", "p", "--output", "o")
DPO = ("--model", "m", "--preferences", "p", "--output", "o")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (sft, (*SFT, "--batch-size", "0"), "--batch-size 0: Input should be greater than 0"),
        (sft, (*SFT, "--learning-rate", "nan"), "--learning-rate nan: Input should be a finite"),
        (sft, (*SFT, "--warmup", "1.5"), "--warmup 1.5: Input should be less than or equal to 1"),
        (sft, (*SFT, "--seed", str(2**32)), "--seed 4294967296: "),
        (dpo, (*DPO, "--max-rows", "0"), "--max-rows 0: "),
        (dpo, (*DPO, "--epochs", "-1"), "--epochs -1.0: "),
        (proxy_ppo, (*PPO, "--steps", "0"), "--steps 0: "),
        (proxy_ppo, (*PPO, "--episodes", "1"), "--episodes 1: "),
        (proxy_ppo, (*PPO, "--decoding.top-p", "0"), "--decoding.top-p 0.0: "),
        (proxy_ppo, (*PPO, "--decoding.temperature", "-inf"), "--decoding.temperature -inf: "),
    ],
)
def test_a_number_out_of_its_bounds_is_named(
    command: ModuleType,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(OptionError) as error:
        read_options(command.Options, None)
    assert str(error.value).startswith(message)


@dataclass(frozen=True)
class Inner:
    """Within."""

    file: str | None = None
    """A path."""


@dataclass(frozen=True)
class Paths:
    """All kinds."""

    name: str
    """A path or something else."""
    several: tuple[Path, ...]
    """Paths."""
    inner: Inner
    """More."""
    number: Positive = 1.5
    """No path."""


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    arguments = ["--name=~/model", "--several", "~/a", "b~", "--inner.file=~/c"]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    options = read_options(Paths, None)
    home = "/home/somebody"
    assert options == Paths(f"{home}/model", (Path(f"{home}/a"), Path("b~")), Inner(f"{home}/c"))
    assert all(is_dataclass(value) is (name == "inner") for name, value in _values(options))


def _values(options: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(options, field.name)) for field in fields(options)]
