"""Functions that a command line names."""

import math

import pytest

from judge.functions import load_function


def test_a_function_by_its_name() -> None:
    assert load_function("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("math:pi", ValueError, "'math:pi' is no function: 3.14"),
        ("math:nothing", AttributeError, "nothing"),
        ("no_such_module:f", ModuleNotFoundError, "no_such_module"),
        ("math", AttributeError, "attribute"),
    ],
)
def test_what_is_none(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_function(name)
