"""User functions that a command line names as `module:function`: rewards and graders."""

import importlib
from collections.abc import Callable
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: it is not callable.
        Exception: the module cannot be imported, or has no such name.
    """
    module, _, function = name.partition(":")
    loaded = getattr(importlib.import_module(module), function)
    if not callable(loaded):
        raise ValueError(f"{name!r} is no function: {loaded!r}")
    return loaded
