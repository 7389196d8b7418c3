"""Serve a frozen LLM with its proxies and its judge:

    python -m server --model deploy/demo/model --proxy aligned=deploy/demo/proxies/aligned

All of vLLM's own flags are understood (`--help=all`). Exit code 2: something was refused before the
engine started, and one line on stderr says what.
"""

import os
import signal
import sys
import tempfile


def main() -> None:
    # Until vLLM takes over the signals, the end is as orderly as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # prometheus_client decides at its import whether metrics are shared between processes. The
    # engine and its worker live in other processes, so the directory must be there before.
    with tempfile.TemporaryDirectory(prefix="assent-metrics-") as metrics_directory:
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics_directory)
        from server.cli import serve

        serve(sys.argv[1:])


if __name__ == "__main__":
    main()
