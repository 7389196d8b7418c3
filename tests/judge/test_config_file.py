"""Options from a YAML file."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from judge.options import OptionError, Positive, read_options


@dataclass(frozen=True)
class Nucleus:
    temperature: Positive = 1.0
    """Its temperature."""
    greedy: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of nothing."""

    model: str
    learning_rate: Positive = 1e-3
    sources: tuple[str, ...] = ()
    held_out: Path | None = Path("here")
    shuffle: bool = True
    decoding: Nucleus = field(default_factory=Nucleus)


def read(
    monkeypatch: pytest.MonkeyPatch, file: Path, content: str | bytes, *arguments: str
) -> Options:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setattr(sys, "argv", ["command", f"--config={file}", *arguments])
    return read_options(Options, None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_every_kind_of_value(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    content = """
        model: base            # required
        learning_rate: 5e-4    # YAML reads it as a text
        sources: [a.jsonl, b c.jsonl]
        held-out: null
        shuffle: false
        decoding:
          temperature: 0.5
          greedy: true
    """
    assert read(monkeypatch, file, content) == Options(
        model="base",
        learning_rate=5e-4,
        sources=("a.jsonl", "b c.jsonl"),
        held_out=None,
        shuffle=False,
        decoding=Nucleus(0.5, greedy=True),
    )


def test_the_command_line_wins(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    content = "{model: a, sources: [x, y], shuffle: false, decoding.greedy: true}"
    given = ("--model", "b", "--sources", "z", "--shuffle", "--decoding.no-greedy")
    expected = Options(model="b", sources=("z",), shuffle=True)
    assert read(monkeypatch, file, content, *given) == expected
    assert read(monkeypatch, file, content).decoding == Nucleus(greedy=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", r"there is no option learning-rat: did you mean learning-rate\?"),
        ("decoding: {temprature: 1}", r"did you mean decoding\.temperature\?"),
        ("xyz: 1", "there is no option xyz: --help lists all"),
        ("output: [", "not YAML"),
        ("- model", "expected options, one `name: value` a line"),
        ("", "expected options"),
        ("sources: [{a: b}]", "sources: expected a value or a list of values"),
        ("shuffle: often", "shuffle: 'often' is neither true nor false"),
        ("{model: a, learning_rate: -1}", "--learning-rate -1.0: Input should be greater than 0"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, file: Path, content: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        read(monkeypatch, file, content, "--model", "a")
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_given_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for arguments, message in (
        (["--config", str(tmp_path / "none")], "none: No such file"),
        (["--config"], "Is a directory"),
        (["--config", "a", "--config=b"], "is given 2 times"),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(OptionError, match=message):
            read_options(Options, None)
