"""User functions that a command line names as `module:function`: rewards and graders."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module may be in the current directory.

    Raises:
        ValueError: it is not callable.
        Exception: the module cannot be imported, or has no such name.
    """
    module, _, function = name.partition(":")
    # The command `assent` leaves it out of the path. It comes last, so that no file there hides an installed module.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    loaded = getattr(importlib.import_module(module), function)
    if not callable(loaded):
        raise ValueError(f"{name!r} is no function: {loaded!r}")
    return loaded
