"""Ends an engine whose server has been killed: it would keep the device's memory from the server's successor."""

import logging
import os
import select
import signal
import threading

import psutil

SERVER_PID = "ASSENT_SERVER_PID"
"""Environment variable that the server sets for the processes it starts."""

logger = logging.getLogger(__name__)


def end_with_server() -> None:
    """From now on this process is killed when the server that it descends from ends in whatever way.

    Where there is no server, as in a rollout, or none on this host, nothing happens.
    """
    pid = int(os.environ.get(SERVER_PID, "0"))
    if pid not in {parent.pid for parent in psutil.Process().parents()}:
        return
    server = os.pidfd_open(pid)

    def wait() -> None:
        select.select([server], [], [])
        logger.error("The server was killed: its engine ends too.")
        os.kill(os.getpid(), signal.SIGKILL)  # whatever it is doing

    threading.Thread(target=wait, name="end-with-server", daemon=True).start()
