"""Files of principles: their fields, and errors that name the mistake."""

import pytest

from judge.principles import (
    DEFAULT,
    Principle,
    PrincipleError,
    principles_of,
    read_principles,
    write_principles,
)

TOML = """
[honesty]
system = "Choose the response that claims nothing it cannot know."

[brevity]
system = "Choose the shorter response."
question = "{conversation}|{response_a}|{response_b}"
answer = "Shorter is"
"""
YAML = """
honesty:
  system: Choose the response that claims nothing it cannot know.
brevity:
  system: Choose the shorter response.
  question: "{conversation}|{response_a}|{response_b}"
  answer: Shorter is
"""


@pytest.mark.parametrize(("name", "text"), [("p.toml", TOML), ("p.yaml", YAML), ("p.yml", YAML)])
def test_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    principles = read_principles(tmp_path / name)
    assert list(principles) == ["honesty", "brevity"]
    assert principles["honesty"].answer == "The better response is"
    assert principles["brevity"] == Principle(
        system="Choose the shorter response.",
        question="{conversation}|{response_a}|{response_b}",
        answer="Shorter is",
    )
    write_principles(tmp_path / "principles.json", principles)
    assert principles_of(tmp_path) == principles


def test_a_model_without_a_file(tmp_path):
    assert principles_of(tmp_path) is DEFAULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "p.toml: cannot be read: "),
        ("", "one table per principle"),
        ("x = 1", r"p.toml: x: "),
        ("[x]", r"p.toml: x.system: Field required"),
        ("[x]\nsystem = ''", r"p.toml: x.system: "),
        ("[x]\nsystem = 's'\nsytem = 's'", r"p.toml: x.sytem: Extra inputs"),
        ("[x]\nsystem = 's'\nquestion = '{conversation}'", r"x.question: .*each of"),
        (
            "[x]\nsystem = 's'\nquestion = '{conversation}{response_a}{response_b}{name}'",
            "no other slot",
        ),
        ("[x]\nsystem = 's'\nquestion = '{conversation'", "is no template"),
    ],
)
def test_mistakes(tmp_path, text, message):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(PrincipleError, match=message):
        read_principles(tmp_path / "p.toml")


def test_no_such_file(tmp_path):
    with pytest.raises(PrincipleError, match=r"none.toml: cannot be read"):
        read_principles(tmp_path / "none.toml")
