"""The output directory of a run: existing files are not destroyed, and an unfinished run is recognised.

A run's directory holds `assent_run.json`: the command, its options, a digest of each input, the files that the run
writes, and whether it is finished. `run` allows a command to write into

- a directory that is empty or does not exist;
- with `--resume`, a directory with a run of the same command with the same options and the same inputs;
- with `--overwrite`, a directory with an earlier run of the same command, whose files are removed when the new run
  begins to write, or with other files, which stay, as long as none has the name of a file that the run writes.

A path that is an input, is inside one or contains one is always refused.
"""

import errno
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env
from safetensors import SafetensorError

from training.console import Interrupted, TrainingError
from training.model_card import Score
from training.output_checks import (
    listed,
    refuse_foreign,
    refuse_inputs,
    refuse_other_run,
    refuse_unwritable,
)
from training.run_marker import (
    Marker,
    digest_of,
    read_marker,
    settings_of,
    write_marker,
)
from training.run_options import refuse_unreportable


class Run:
    """A command and its output directory, in one of the run's processes."""

    def __init__(
        self,
        directory: Path,
        marker: Marker,
        before: Marker | None,
        *,
        can_resume: bool,
        resumes: bool,
    ) -> None:
        self.directory, self._marker, self._before = directory, marker, before
        self._can_resume, self._resumes = can_resume, resumes
        self._has_started = False
        self.is_finished = resumes and before is not None and before.finished
        """Whether there is nothing to do: the run to be resumed is finished."""
        self.saved: str | None = None
        """The state that `--resume` would continue from; None = there is none."""
        self.scores: list[Score] = []
        """What the command measured, for the model card."""

    @property
    def command(self) -> str:
        """The module's name."""
        return self._marker.command

    @property
    def is_main(self) -> bool:
        """Whether this is the run's main process."""
        return _is_main_process()

    def check(self, *, overwrite: bool) -> None:
        """
        Raises:
            TrainingError: the directory holds files that the run must not touch.
        """
        target, before, command = self.directory, self._before, self._marker.command
        if before is None:
            names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
            if names and not overwrite:
                raise TrainingError(
                    f"{target} is not empty ({listed(names)}) and holds no run of {command}: name another directory, "
                    "or keep these files and write there with --overwrite"
                )
        elif before.command != command:
            raise TrainingError(
                f"{target} holds what {before.command} made, and this is {command}: name another directory"
            )
        elif self._resumes:
            refuse_other_run(target, before, self._marker)
            if before.finished:
                print(f"{target}: this run is finished; there is nothing to do")
        elif not overwrite:
            state = "a finished" if before.finished else "an unfinished"
            can_continue = self._can_resume and not before.finished
            advice = "continue with --resume" if can_continue else "name another directory"
            raise TrainingError(
                f"{target} holds {state} run of {command}: {advice}, or replace it with --overwrite"
            )
        refuse_foreign(target, self._marker.files, before.files if before else [])

    def start(self) -> None:
        """Begin to write: create the directory and its marker, and remove the files that are replaced.

        All inputs should have been read before, so that an error in them destroys no earlier run.
        """
        self._has_started = True
        if not _is_main_process():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._before is not None and not self._resumes:
            remove(self.directory, self._before.files)
        marker = self._before if self._resumes and self._before else self._marker
        write_marker(self.directory, marker.model_copy(update={"finished": False}))

    def finish(self) -> None:
        """Mark the run as finished, with the files that it wrote: files added later are not the run's."""
        if self._has_started and _is_main_process():
            marker = read_marker(self.directory)
            assert marker is not None, "written at the start"
            found = {path for pattern in marker.files for path in self.directory.glob(pattern)}
            files = sorted(escape(str(path.relative_to(self.directory))) for path in found)
            write_marker(
                self.directory, marker.model_copy(update={"files": files, "finished": True})
            )

    def left(self) -> str:
        """What an interrupted run leaves, and how to continue."""
        if not self._has_started:
            return "nothing was written"
        if not self._can_resume:
            return f"{self.directory} is not whole; begin again with --overwrite"
        saved = f"saved up to {self.saved}" if self.saved else "nothing was saved yet"
        return f"{saved} in {self.directory}; the same command continues with --resume"


@contextmanager
def run(
    options: Any,
    command: str,
    *,
    reads: Sequence[str],
    writes: Sequence[str],
    directory: Path | None = None,
    resume: bool | None = None,
) -> Iterator[Run]:
    """Enter the output directory of a command; the run is finished when the block ends without an error.

    Args:
        options: a dataclass; its `output`, `overwrite` and, if it has one, `resume` are those of the command line
        command: the module's name
        reads: names of the options that are inputs
        writes: names and patterns of files that the run writes below its directory
        directory: instead of `output`
        resume: instead of the option

    Raises:
        TrainingError: the directory cannot be written, or holds files that must not be touched.
        Interrupted: the user pressed Ctrl-C; its message, and that of a full disk, say what was saved.
    """
    refuse_unreportable(options)
    target = options.output if directory is None else directory
    resumes = getattr(options, "resume", False) if resume is None else resume
    inputs = {name: getattr(options, name) for name in reads}
    refuse_inputs(target, inputs)
    refuse_unwritable(target, is_directory=True)
    marker = Marker(
        command=command,
        options=settings_of(options, reads),
        inputs={name: digest_of(value) for name, value in inputs.items()},
        files=list(writes),
    )
    before = read_marker(target)
    if getattr(options, "resume", False) and options.overwrite:
        raise TrainingError(
            "--resume continues a run and --overwrite starts a new one: give one of them"
        )
    current = Run(target, marker, before, can_resume=hasattr(options, "resume"), resumes=resumes)
    if _is_main_process():  # other processes may arrive after it has begun
        current.check(overwrite=options.overwrite)
    try:
        yield current
    except Interrupted:  # from a run nested in this one
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {current.left()}" if _is_main_process() else "") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_of_writing(error):
            raise
        raise TrainingError(
            f"{target} cannot be written; is the disk full? ({error}); {current.left()}"
        ) from None
    current.finish()


def _is_of_writing(error: Exception) -> bool:
    """Whether the error means a full or broken disk, as Python, safetensors and PyTorch report it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return "I/O error" in str(error) or "inline_container" in str(error)


def claim(directory: Path, names: Sequence[str]) -> None:
    """Add files to those of the run in the directory. Does nothing if no run was begun there.

    Raises:
        TrainingError: one of them exists and is not the run's.
    """
    marker = read_marker(directory)
    if marker is None:
        return
    refuse_foreign(directory, names, marker.files)
    files = [*marker.files, *(name for name in names if name not in marker.files)]
    write_marker(directory, marker.model_copy(update={"files": files}))


def is_own(path: Path) -> bool:
    """Whether the run in its directory wrote the file. Without a run, every file counts as own."""
    marker = read_marker(path.parent)
    return marker is None or any(path.match(pattern) for pattern in marker.files)


def remove(directory: Path, names: Iterable[str]) -> None:
    """Remove files and directories of these names or patterns, and directories that become empty."""
    for pattern in names:
        for path in sorted(directory.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        parent = (directory / pattern).parent
        if parent != directory and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def check_file(target: Path, options: Any, *, reads: Sequence[str]) -> None:
    """Check a file that a command writes.

    Raises:
        TrainingError: it cannot be written, is an input, or exists without `overwrite`.
    """
    refuse_inputs(target, {name: getattr(options, name) for name in reads})
    refuse_unwritable(target, is_directory=False)
    if target.exists() and not options.overwrite:
        raise TrainingError(
            f"{target} is there already: name another file, or replace it with --overwrite"
        )


def _is_main_process() -> bool:
    """Of those that `accelerate launch`, torchrun or MPI started; told before they know each other."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return get_int_from_env(names, 0) == 0
