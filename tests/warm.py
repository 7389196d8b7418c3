"""Commands started from a process that has imported their libraries: each begins without 9 seconds of imports.

`multiprocessing`'s fork server imports third-party libraries, once for all tests of a worker. Our own modules are
imported by every command anew, in a process of its own, with an environment, streams, signals and an exit code.
Processes that a command would spawn through `multiprocessing`, such as vLLM's engines and workers, are forked from it
where it has one thread.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import popen_fork
from multiprocessing.context import SpawnProcess
from pathlib import Path

# What the commands import when they start. Not vLLM, which looks at the environment meanwhile, nor numba: an engine
# cannot start in a process that holds its llvmlite already.
LIBRARIES = [
    *(
        "accelerate",
        "datasets",
        "matplotlib.backends.backend_agg",
        "openai",
        "peft",
        "scipy.signal",
        "sqlalchemy",
    ),
    *("torch._dynamo", "torch._inductor.lowering", "torch.utils.tensorboard", "tyro"),
    *("transformers.models.llama.modeling_llama", "transformers.trainer"),
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


class Command:
    """A running `python -m` command, with as much of `subprocess.Popen` as the tests need."""

    def __init__(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] = os.environ,
        directory: Path | None = None,
        new_session: bool = False,
        log: Path | None = None,
    ) -> None:
        """
        Args:
            environment: all of it.
            directory: where it runs; None = here.
            new_session: as in `subprocess.Popen`.
            log: file for its stdout and stderr; None = `communicate` returns both.
        """
        self._arguments = [*map(str, arguments)]
        self._outputs = (log, log) if log else (_empty_file(), _empty_file())
        self._process = _context.Process(
            target=_run,
            args=(
                self._arguments,
                dict(environment),
                directory or Path.cwd(),
                self._outputs,
                new_session,
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code as in `subprocess`; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout or 0)
        return code

    def communicate(self) -> tuple[str, str]:
        """Wait for its end and return its stdout and stderr. Call it once."""
        self.wait()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._outputs)
        for path in self._outputs:
            path.unlink()
        return out, err


def _empty_file() -> Path:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        return Path(file.name)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = Command(*arguments)
    out, err = command.communicate()
    return subprocess.CompletedProcess([*map(str, arguments)], command.wait(), out, err)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    directory: Path,
    outputs: tuple[Path, Path],
    new_session: bool,
) -> None:
    """Do what `python -m` does, in the forked process."""
    gc.freeze()  # what is imported: it need not be searched for garbage
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, path in enumerate(outputs, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    extra_paths = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = [str(directory), *extra_paths]
    sys.argv = ["-m", *arguments[1:]]
    _apply_environment()
    # A fork loses the threads of GNU's OpenMP, and waits for them.
    if environment.get("OMP_NUM_THREADS") == "1":
        setattr(SpawnProcess, "_Popen", staticmethod(popen_fork.Popen))  # noqa: B010
        os.register_at_fork(after_in_child=_reset_after_fork)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # `multiprocessing` does not call them


def _reset_after_fork() -> None:
    gc.freeze()
    signal.set_wakeup_fd(-1)  # of the parent's event loop
    _apply_environment()


def _apply_environment() -> None:
    """Apply the variable that torch reads only when it is imported."""
    import torch._dynamo

    torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
