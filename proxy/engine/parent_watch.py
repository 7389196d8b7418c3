"""Ends the engine when its server was killed: otherwise it would keep the device's memory from the next server."""

import logging
import os
import select
import signal
import threading

import psutil

SERVER_PID = "ASSENT_SERVER_PID"
"""Environment variable that the server sets for the processes it starts."""

logger = logging.getLogger(__name__)


def watch_parent() -> None:
    """Kill this process as soon as the server that started it ends, however it ends.

    Does nothing where there is no server, as in a rollout, or none on this host.
    """
    pid = int(os.environ.get(SERVER_PID, "0"))
    if pid not in {parent.pid for parent in psutil.Process().parents()}:
        return
    server = os.pidfd_open(pid)

    def wait() -> None:
        select.select([server], [], [])
        logger.error("The server was killed: its engine ends too.")
        os.kill(os.getpid(), signal.SIGKILL)  # even in the middle of a step

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()
