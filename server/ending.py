"""The end of the process, whatever hangs.

vLLM's shutdown waits for its engine, uvicorn's for connections, and asyncio's for threads. Each may wait forever: for a
stopped process, a client that does not read, a locked file.
"""

import multiprocessing
import os
import shutil
import threading

END_SECONDS = 5.0
"""From the beginning of a shutdown to the end of the process."""
GRACEFUL_SECONDS = 2
"""Of these, what uvicorn may wait for connections."""


def end_now(exit_code: int) -> None:
    """End this process and its children without any further step."""
    for child in multiprocessing.active_children():
        child.kill()
    if directory := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(exit_code)


def end_soon(exit_code: int) -> None:
    """End the process after END_SECONDS, unless it has ended by then."""
    timer = threading.Timer(END_SECONDS, end_now, [exit_code])
    timer.daemon = True  # it keeps nobody who has finished
    timer.start()
