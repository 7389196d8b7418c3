"""What every training command does at its edge: errors of the user's become one line and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from judge.principles import PrincipleError
from judge.prompts import JudgePromptError
from proxy.checkpoint import ProxyError


class TrainingError(ValueError):
    """Something that the user can mend; the message says what, where and how."""


@contextmanager
def main_guard() -> Iterator[None]:
    """Turn errors that the user can mend into a message and exit code 2; let all others through."""
    try:
        yield
    except (TrainingError, ProxyError, JudgePromptError, PrincipleError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
