"""Whether the engine answers, for GET /ready. A request to it costs no token."""

import asyncio
from time import monotonic

from server.engine import Workers

ANSWER_SECONDS = 5.0
"""The engine answers between two steps: longer than the longest step."""
CACHE_SECONDS = 1.0
"""Anybody may ask, so the engine is asked no more often."""


class Readiness:
    """Asks the engine, once for all who want to know at the same time."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._task: asyncio.Task[bool] | None = None
        self._asked_at = -CACHE_SECONDS

    async def check(self) -> bool:
        """Whether the engine has answered within ANSWER_SECONDS, now or in the last CACHE_SECONDS."""
        if self._task is None or (
            self._task.done() and monotonic() - self._asked_at > CACHE_SECONDS
        ):
            self._task = asyncio.create_task(self._ask())
        return await asyncio.shield(self._task)

    async def _ask(self) -> bool:
        try:
            await asyncio.wait_for(self._workers.collective_rpc("list_proxies"), ANSWER_SECONDS)
        except Exception:  # it is stopped, dead, or stuck
            return False
        finally:
            self._asked_at = monotonic()
        return True
