"""Serve a frozen LLM with its proxies and its judge:

    python -m server --model deploy/demo/model --proxy aligned=deploy/demo/proxies/aligned

All of vLLM's own flags are understood (`--help=all`). Exit code 2: something was refused before the
engine started, and one line on stderr says what. `python -m server doctor ...` looks at all of it,
without a start.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from typing import Any

from proxy.engine.parent_watch import SERVER_PID


def main() -> None:
    # prometheus_client decides at its import whether metrics are shared between processes. The
    # engine and its worker live in other processes, so the directory must be there before.
    with tempfile.TemporaryDirectory(prefix="assent-metrics-") as metrics_directory:
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics_directory)
        os.environ[SERVER_PID] = str(os.getpid())
        stop_at_once_on_sigterm(metrics_directory)
        if sys.argv[1:2] == ["doctor"]:
            from server.doctor import main as examine

            examine(sys.argv[2:])
        from server.cli import serve

        serve(sys.argv[1:])


def stop_at_once_on_sigterm(metrics_directory: str) -> None:
    """While the server starts; once it serves, vLLM lets SIGTERM end it in good order.

    An exception does not do: while vLLM waits for its engine the exception gets lost, and where it
    does not, the engine's process may be left behind.
    """

    def stop(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        shutil.rmtree(metrics_directory, ignore_errors=True)
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    main()
