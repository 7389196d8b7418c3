"""Functions that a command line names."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from judge.functions import load_function

ROOT = Path(__file__).parents[2]


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


def test_a_module_of_the_current_directory_that_python_does_not_search(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(): return 1\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hides an installed module')\n")
    code = "from judge.functions import load_function; import json; print(load_function('mine:reward')())"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert result.stdout == "1\n", result.stderr
