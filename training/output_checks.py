"""What a command refuses before it writes: its inputs as its output, unwritable paths, foreign files, other options."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.console import TrainingError
from training.run_marker import Marker, differing, paths_of


def refuse_inputs(target: Path, inputs: dict[str, Any]) -> None:
    """
    Raises:
        TrainingError: the target is an input, is in one, or holds one, links followed.
    """
    output = target.resolve()
    for name, value in inputs.items():
        for entry in paths_of(value):
            path = Path(str(entry).partition(":///")[2] or entry)  # a database may be a URL
            if not path.exists():  # the name of something elsewhere
                continue
            resolved = path.resolve()
            relation = (
                "is" if resolved == output
                else "is in" if output.is_relative_to(resolved)
                else "holds" if resolved.is_relative_to(output)
                else None
            )  # fmt: skip
            if relation:
                raise TrainingError(
                    f"{target} {relation} an input, {_flag(name)} {entry}: name another path"
                )


def refuse_unwritable(target: Path, *, is_directory: bool) -> None:
    if is_directory and target.exists() and not target.is_dir():
        raise TrainingError(f"{target} is a file, and must be a directory")
    if not is_directory and target.is_dir():
        raise TrainingError(f"{target} is a directory, and must be a file")
    ancestor = target if is_directory else target.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.absolute().parent
    if not ancestor.is_dir():
        raise TrainingError(f"{target}: {ancestor} is a file, and must be a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise TrainingError(f"{target}: {ancestor} cannot be written to")


def refuse_foreign(directory: Path, names: Iterable[str], own: Iterable[str]) -> None:
    """
    Raises:
        TrainingError: a file has the name of one that the run writes, and is not its own.
    """
    own_files = {path for pattern in own for path in directory.glob(pattern)}
    foreign = {path for pattern in names for path in directory.glob(pattern)} - own_files
    if foreign:
        names_found = listed(sorted(str(path.relative_to(directory)) for path in foreign))
        raise TrainingError(
            f"{directory} has files that this run would replace and did not write ({names_found}): move them, or name "
            "another directory"
        )


def refuse_other_run(target: Path, before: Marker, now: Marker) -> None:
    """
    Raises:
        TrainingError: the run that is to go on had other options or inputs.
    """
    options = differing(before.options, now.options)
    inputs = differing(before.inputs, now.inputs)
    differences = [f"other options ({', '.join(options)})"] if options else []
    differences += [f"other data or models ({', '.join(inputs)})"] if inputs else []
    if differences:
        raise TrainingError(
            f"--resume: {target} is of a run with {' and '.join(differences)}: continue with the same ones, or start "
            "anew with --overwrite"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
