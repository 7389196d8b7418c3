"""Serve a frozen LLM with its proxies and its judge:

    python -m server --model deploy/demo/model --proxy aligned=deploy/demo/proxies/aligned

All of vLLM's own options work too (`--help=all`). Exit code 2: something was refused before the
engine started, and one line on stderr says what. `python -m server doctor ...` checks the same
options without a start.
"""

import os
import signal
import sys
import tempfile

from server.ending import end_now
from server.own_packages import check_packages


def main() -> None:
    check_packages()  # before anything of them is imported
    from proxy.engine.parent_watch import SERVER_PID

    # prometheus_client decides at its import whether metrics are shared between processes. The
    # engine and its worker live in other processes, so the directory must be there before.
    with tempfile.TemporaryDirectory(prefix="assent-metrics-") as metrics_directory:
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics_directory)
        os.environ[SERVER_PID] = str(os.getpid())
        exit_on_sigterm()
        if sys.argv[1:2] == ["doctor"]:
            _doctor(sys.argv[2:])
        else:
            from server.cli import serve

            serve(sys.argv[1:])


def _doctor(argv: list[str]) -> None:
    from server.arguments import StartupError
    from server.cli import refuse
    from server.doctor import main as examine

    try:
        examine(argv)
    except StartupError as error:
        refuse(error)


def exit_on_sigterm() -> None:
    """While the server starts, end at once. Once it serves, `middleware.drain` handles SIGTERM.

    Raising an exception is no solution: vLLM may lose it while it waits for its engine, and the
    engine's process may be left behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: end_now(128 + signal.SIGTERM))


if __name__ == "__main__":
    main()
