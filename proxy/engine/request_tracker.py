"""The requests that a worker has in hand, or had lately: their assignments, and the batch's plan.

A request is assigned once, when it is first seen: it keeps its proxy, and so the version, whatever
is loaded or unloaded later. A plan is made when the batch changes and kept while it stays the same.
"""

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from proxy.engine.assignment import Assignment
from proxy.engine.batch_plan import BatchPlan, make_plan
from proxy.engine.decision_stats import DecisionStats
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.noise import noise_key
from proxy.request import WorkerAlignment, alignment_of, caller_id

logger = logging.getLogger(__name__)

FindProxy = Callable[[str, str | None], ServedProxy | None]
"""(name, version or None) -> the loaded proxy, if there is one."""


class Batch(NamedTuple):
    """One step's requests, as the model runner knows them."""

    req_ids: Sequence[str]  # of each row
    params_of: Callable[[str], Any]  # -> vLLM's SamplingParams, or None
    live: Collection[str]  # every request that the worker knows, in this step or not


class RequestTracker:
    """Assignments of requests by the engine's ids, and their counts."""

    def __init__(self, device: torch.device, *, reports: bool = True, capacity: int = 4096) -> None:
        """
        Args:
            device: where the logits are.
            reports: False on the ranks that must not count a second time.
            capacity: requests whose counts are kept. When it is full, a finished request that
                nobody asked for is forgotten, the oldest first; live ones never are.
        """
        self.stats = DecisionStats(device, reports=reports)
        self._device = device
        self._reports = reports
        self._capacity = capacity
        self._live: dict[str, Assignment] = {}
        self._counted: dict[str, Assignment] = {}  # with a proxy, and counts that nobody has taken
        self._finished: dict[str, Assignment] = {}  # those of them that have finished, oldest first
        self._engine_ids: dict[str, set[str]] = {}  # caller's id -> ids of counted requests
        self._plan: BatchPlan | None = None

    def plan(
        self, batch: Batch, pool: ProxyPool, find: FindProxy, *, shadows: Sequence[ServedProxy]
    ) -> BatchPlan:
        """A new plan, for a batch that `plan_of` has none for."""
        self._set_finished_aside(batch.live)
        live, params_of = self._live, batch.params_of
        assignments = [live.get(i) or self._assignment(i, params_of, find) for i in batch.req_ids]
        self._plan = make_plan(batch.req_ids, assignments, pool, self._device, shadows=shadows)
        return self._plan

    def plan_of(self, req_ids: Sequence[str]) -> BatchPlan | None:
        """The last step's plan, if the last step had these requests."""
        return self._plan if self._plan is not None and self._plan.req_ids == req_ids else None

    def forget_plan(self) -> None:
        """Make the next plan afresh: the pool has changed."""
        self.stats.aggregate()  # steps that are not added up hold on to the old tensors
        self._plan = None

    def proxies_in_use(self, live: Collection[str]) -> set[ServedProxy]:
        """The proxies of requests that may go on."""
        self._set_finished_aside(live)
        return {proxy for a in self._live.values() for proxy, _ in a.shares}

    def take(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The counts of requests, which are then forgotten: to be called when they have finished.

        `request_ids` are callers' ids or the engine's; the answer has the engine's. Requests
        without a proxy, and unknown ones, are left out.
        """
        if not self._reports:
            return {}
        taken = self._counted_of(request_ids)
        self.stats.aggregate([assignment.counts for assignment in taken.values()])
        answer = {}
        for req_id, assignment in taken.items():
            proxies = [proxy for proxy, _ in assignment.shares]
            counts = assignment.counts
            accepted = counts.tokens - counts.forced
            answer[req_id] = {
                "proxy": "+".join(proxy.name for proxy in proxies),
                "version": "+".join(proxy.version for proxy in proxies),
                "proposed": counts.proposed,
                "accepted": accepted,
                "rejected": counts.proposed - accepted,
                "forced": counts.forced,
            }
            counts.closed = True  # a step of it may be under way
            self._forget(req_id)
        return answer

    def take_traces(self, request_ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The traces of requests since the last time, by the engine's ids; call it before `take`.

        Requests without anything new are left out.
        """
        assignments = self._counted_of(request_ids)
        self.stats.aggregate([assignment.counts for assignment in assignments.values()])
        take = self.stats.traces.take
        return {req_id: entries for req_id in assignments if (entries := take(req_id))}

    def _counted_of(self, request_ids: Iterable[str]) -> dict[str, Assignment]:
        """The assignments of the requests that have counts, by the engine's ids."""
        result = {}
        for given in request_ids:
            for req_id in sorted(self._engine_ids.get(given, ())) or [given]:
                if req_id in self._counted:
                    result[req_id] = self._counted[req_id]
        return result

    def _set_finished_aside(self, live: Collection[str]) -> None:
        for req_id in [r for r in self._live if r not in live]:
            assignment = self._live.pop(req_id)
            if req_id in self._counted:
                self._finished[req_id] = assignment

    def _assignment(
        self, req_id: str, params_of: Callable[[str], Any], find: FindProxy
    ) -> Assignment:
        # Model Runner V2 drops preempted requests and shows them again as new ones.
        preempted = self._finished.pop(req_id, None)
        self._live[req_id] = preempted or self._assign(req_id, params_of(req_id), find)
        return self._live[req_id]

    def _assign(self, req_id: str, params: Any, find: FindProxy) -> Assignment:
        alignment = alignment_of(getattr(params, "extra_args", None))
        unproxied = Assignment(
            req_id,
            temperature=getattr(params, "temperature", 1.0),
            top_k=max(0, getattr(params, "top_k", 0)),
            top_p=getattr(params, "top_p", 1.0),
            shadowed=alignment.shadow,
        )
        if not alignment.acts:
            return unproxied
        shares = _shares(alignment, find)
        if shares is None:
            return unproxied
        (proxy, strength), *partners = shares
        max_rejections = alignment.max_rejections
        if max_rejections is None:
            max_rejections = min(proxy.config.max_rejections for proxy, _ in shares)
        stop_ids = {*(params.stop_token_ids or ()), params.eos_token_id} - {None}
        assignment = replace(
            unproxied,
            proxy=proxy,
            strength=strength,
            partners=tuple(partners),
            max_rejections=max_rejections,
            key=_random_key() if params.seed is None else noise_key(params.seed),
            is_seeded=params.seed is not None,
            stop_ids=tuple(stop_ids),
            max_tokens=getattr(params, "max_tokens", None) or sys.maxsize,
            traced=alignment.trace,
        )
        self._remember(req_id, assignment)
        return assignment

    def _remember(self, req_id: str, assignment: Assignment) -> None:
        """Keep the counts of a new request until somebody takes them."""
        if len(self._counted) >= self._capacity and self._finished:
            oldest = next(iter(self._finished))
            self.stats.aggregate([self._finished[oldest].counts])  # for the metrics
            self._forget(oldest)
        self._counted[req_id] = assignment
        self._engine_ids.setdefault(caller_id(req_id), set()).add(req_id)

    def _forget(self, req_id: str) -> None:
        del self._counted[req_id]
        self._finished.pop(req_id, None)
        self.stats.traces.forget(req_id)
        siblings = self._engine_ids[caller_id(req_id)]
        siblings.discard(req_id)
        if not siblings:
            del self._engine_ids[caller_id(req_id)]


def _shares(alignment: WorkerAlignment, find: FindProxy) -> list[tuple[ServedProxy, float]] | None:
    """The proxies that decide a request, and their strengths; None, with a warning, where they cannot.

    In the order of their names, whatever order the request has: sums of more than two costs depend on it.
    """
    shares = []
    for name, strength in sorted(alignment.strengths.items()):
        if strength > 0:
            version = alignment.version_of(name)
            proxy = find(name, version)
            if proxy is None:
                warning = "No proxy %r, version %s, is loaded: sampled without one."
                logger.warning(warning, name, version)
                return None
            shares.append((proxy, strength))
    if len({proxy.config.temperature for proxy, _ in shares}) > 1:
        names = ", ".join(proxy.name for proxy, _ in shares)
        logger.warning("%s are trained at different temperatures: sampled without a proxy.", names)
        return None
    return shares


def _random_key() -> int:
    """From torch's own generator, which vLLM seeds alike on all tensor-parallel ranks."""
    return int(torch.randint(2**63 - 1, ()))
