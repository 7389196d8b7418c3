"""What the proxy did in a request, as the worker counts and traces it.

The worker keeps both by the engine's own request id. The server knows a request by the id that `engine_wrapper` gave to
the engine. Requests that finish at the same time share one call to the workers.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from proxy.request import caller_id, sample_index
from server.engine import Workers

CALL_SECONDS = 30.0
COUNTS: tuple[Literal["proposed", "accepted", "rejected", "forced"], ...] = (
    *("proposed", "accepted", "rejected", "forced"),
)

Sample = tuple[str, int]
"""(id given to the engine, index of the sample up to n)."""
Entry = TypeVar("Entry")


class ProxyCounts(TypedDict):
    """What the worker counted of a sample."""

    proxy: str
    """Names, joined by +, and so the versions."""
    version: str
    proposed: int
    accepted: int
    rejected: int
    forced: int


class TracedCandidate(TypedDict):
    """A candidate, as the worker reports it. A response adds `token`, its text."""

    token_id: int
    probability: float
    """The LLM's within the nucleus, at the temperature that the proxy was trained at."""
    accept_probability: float | None
    """After the strength; None = the proxy was not asked."""
    by_proxy: NotRequired[dict[str, float]]
    """Of several proxies, each one's factor of it."""
    forced: bool


class TraceEntry(TracedCandidate):
    """An emitted token, and the candidates that were rejected before it, in order of proposal."""

    rejected: list[TracedCandidate]


class WorkerReader(Generic[Entry]):
    """Takes from the workers what they hold of requests; they forget what was taken."""

    def __init__(self, workers: Workers, method: str) -> None:
        """
        Args:
            workers: calls every rank; each request is reported by one rank.
            method: of the worker: request ids -> {engine's own id: entry}.
        """
        self.workers = workers
        self.method = method
        self.waiting: list[tuple[set[str], asyncio.Future[dict[Sample, Entry]]]] = []
        self.reader: asyncio.Task[None] | None = None

    async def take(self, request_ids: Sequence[str]) -> dict[Sample, Entry]:
        """The entries of these requests, by the ids given to the engine."""
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
            entries: dict[Sample, Entry] = {}
            failure: Exception | None = None
            try:
                request_ids = [request_id for ids, _ in batch for request_id in ids]
                # An engine that is shutting down never answers.
                per_rank: Iterable[dict[str, Any]] = await asyncio.wait_for(
                    self.workers.collective_rpc(self.method, args=(request_ids,)), CALL_SECONDS
                )
                entries = {_sample(key): rank[key] for rank in per_rank for key in rank}
            except Exception as error:  # every waiting request must learn of it
                failure = error
            for ids, future in batch:
                if future.done():  # its client has disconnected
                    continue
                if failure is not None:
                    future.set_exception(failure)
                else:
                    future.set_result({key: v for key, v in entries.items() if key[0] in ids})


@dataclass
class AlignmentCounts:
    """What is counted of one HTTP request while it is answered."""

    reader: WorkerReader[ProxyCounts]
    """Reads what the proxy did, which takes a round trip to the engine."""
    in_response: bool
    """Whether the response reports these counts. If not, they are read for the request log only, after the response."""
    engine_ids: list[str] = field(default_factory=list)
    """Ids of the requests to the engine, except a judge's: one per prompt, each with n samples."""
    num_samples: int = 1
    """n of each of them."""
    num_judgments: int = 0
    """Requests to the engine that were a judge's."""
    delivered: Counter[Sample] = field(default_factory=Counter)
    """Tokens that the engine has handed out for each sample."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens spent: `prompt`, `completion`, and `judge_prompt`, `judge_completion`."""
    texts: defaultdict[Sample, str] | None = None
    """Text of each sample; None = it is not to be logged."""
    _reads: dict[str, asyncio.Task[dict[Sample, ProxyCounts]]] = field(default_factory=dict)

    def finish(self, engine_id: str) -> None:
        """The engine has finished this request: read its counts while the response is put together."""
        if self.in_response:
            self._read(engine_id)

    async def total(self) -> dict[str, int]:
        """What the proxy did, summed over all samples."""
        for engine_id in self.engine_ids:
            self._read(engine_id)
        by_sample: dict[Sample, ProxyCounts] = {}
        for read in self._reads.values():
            by_sample |= await read
        return sum_counts(by_sample)

    def _read(self, engine_id: str) -> None:
        if engine_id not in self._reads:
            self._reads[engine_id] = asyncio.ensure_future(self.reader.take([engine_id]))


def sum_counts(by_sample: dict[Sample, ProxyCounts]) -> dict[str, int]:
    """Candidates proposed, accepted and rejected, and forced tokens, over all samples."""
    return {key: sum(counts[key] for counts in by_sample.values()) for key in COUNTS}


def _sample(engine_id: str) -> Sample:
    return caller_id(engine_id), sample_index(engine_id)
