"""Entry point of every training command: errors that the user can fix become one line and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from judge.options import OptionError, read_options
from judge.principles import PrincipleError
from judge.prompts import JudgePromptError
from proxy.checkpoint import ProxyError

__all__ = ["Interrupted", "TrainingError", "main_guard", "read_options"]


class TrainingError(ValueError):
    """An error that the user can fix; the message says what, where and how."""


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C; the message says what was saved and how to resume."""


@contextmanager
def main_guard() -> Iterator[None]:
    """Turn errors that the user can fix into one line and exit code 2, and Ctrl-C into one line and exit code 130.

    Other exceptions pass through.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        line = str(interrupt) if isinstance(interrupt, Interrupted) else "interrupted"
        print(f"\n{line}" if line else "", file=sys.stderr)
        sys.exit(130)
    except (TrainingError, OptionError, ProxyError, JudgePromptError, PrincipleError) as error:
        _end(str(error))
    except OSError as error:
        # Errors that a library raises itself have no `strerror`.
        _end(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SafetensorError as error:  # a full disk raises it too
        _end(f"safetensors: {error}")


def _end(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
