"""What the proxy did in a request, as the worker counts and traces it.

The worker keeps both by the engine's own request id; answers are known by the id that the gate gave
to the engine. Requests that ask at the same time share a call.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from server.engine import Workers

CALL_SECONDS = 30.0
COUNTS = ("proposed", "accepted", "rejected", "forced")

BySample = dict[tuple[str, int], Any]
"""(the id given to the engine, sample) -> what the worker says of it; the sample counts up to n."""

# An id becomes "<id>-<8 hex>" in the engine, and "<i>_<id>-<8 hex>" for sample i of n. Ours start
# with a letter.
_ENGINE_ID = re.compile(r"(?:(\d+)_)?(\D.*?)(?:-[0-9a-f]{8})?", re.DOTALL)


class WorkerReader:
    """Takes what the worker has for requests; what was taken is gone from there."""

    def __init__(self, workers: Workers, method: str) -> None:
        """
        Args:
            workers: makes calls on every rank; each request is one rank's to tell of.
            method: of the worker: request ids -> {engine's own id: anything}.
        """
        self.workers = workers
        self.method = method
        self.waiting: list[tuple[set[str], asyncio.Future[BySample]]] = []
        self.reader: asyncio.Task[None] | None = None

    async def take(self, request_ids: Sequence[str]) -> BySample:
        """What there is for these requests, by the ids given to the engine."""
        if not request_ids:
            return {}
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((set(request_ids), future))
        if self.reader is None or self.reader.done():
            self.reader = asyncio.create_task(self._read_all())
        return await future

    async def _read_all(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting, []
            found: BySample = {}
            failure: Exception | None = None
            try:
                wanted = [request_id for ids, _ in batch for request_id in ids]
                # An engine that is being taken down never answers.
                per_rank = await asyncio.wait_for(
                    self.workers.collective_rpc(self.method, args=(wanted,)), CALL_SECONDS
                )
                found = {_sample(key): each[key] for each in per_rank for key in each}
            except Exception as error:  # whatever it is, those who wait must learn of it
                failure = error
            for ids, future in batch:
                if future.done():  # its client has gone
                    continue
                if failure is not None:
                    future.set_exception(failure)
                else:
                    future.set_result({key: v for key, v in found.items() if key[0] in ids})


def sum_counts(by_sample: BySample) -> dict[str, int]:
    return {key: sum(counts[key] for counts in by_sample.values()) for key in COUNTS}


def _sample(engine_id: str) -> tuple[str, int]:
    match = _ENGINE_ID.fullmatch(engine_id)
    return (match[2], int(match[1] or 0)) if match else (engine_id, 0)
