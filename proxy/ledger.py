"""Which requests follow which proxy, and the plan of the batch they are in.

A plan is made on the host when the batch changes, and kept while it stays the same. A
request is resolved once, when it is first seen: it keeps the proxy, and so the version, that it
began with, whatever is loaded or unloaded meanwhile. `history` has what was decided for it.
Nothing here imports vllm.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from proxy.acceptance import noise_key
from proxy.history import DISCARD_SLOT, History
from proxy.plan import Plan, make_plan
from proxy.pool import ProxyPool, ServedProxy
from proxy.request import alignment_of
from proxy.rows import Assignment

logger = logging.getLogger(__name__)

# vLLM's ids: the caller's id and 8 hex digits; the i-th of n samples has "i_" in front.
_CHILD_PREFIX = re.compile(r"^\d+_")
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

FindProxy = Callable[[str, str | None], ServedProxy | None]
"""(name, version or None) -> the loaded proxy, if there is one."""


class Batch(NamedTuple):
    """One step's requests, as the model runner knows them; a row is a request."""

    req_ids: Sequence[str]
    params_of: Callable[[str], Any]  # -> vLLM's SamplingParams, or None
    live: Collection[str]  # every request the worker knows, scheduled in this step or not


class Ledger:
    """Assignments of the requests that a worker has in hand, or had lately."""

    def __init__(self, device: torch.device, *, reports: bool = True, capacity: int = 4096) -> None:
        """
        Args:
            device: where the logits are.
            reports: False on the ranks that must not count a second time.
            capacity: requests whose counts are kept. When it is full, finished requests that
                nobody asked for are forgotten, the oldest first; live ones are never.
        """
        self._device = device
        self._reports = reports
        self.history = History(device, reports=reports, capacity=capacity)
        self._live: dict[str, Assignment] = {}
        self._finished: dict[str, Assignment] = {}  # oldest first
        self._internal_ids: dict[str, set[str]] = {}  # caller's id -> ids here
        self._free = list(range(capacity, DISCARD_SLOT, -1))
        self._plan: Plan | None = None

    def plan(
        self, batch: Batch, pool: ProxyPool, find: FindProxy, *, shadows: Sequence[ServedProxy]
    ) -> Plan:
        """A new plan, of a batch that `plan_of` has none for."""
        self._set_finished_aside(batch.live)
        live, params_of = self._live, batch.params_of
        assignments = [live.get(i) or self._assignment(i, params_of, find) for i in batch.req_ids]
        self._plan = make_plan(batch.req_ids, assignments, pool, self._device, shadows=shadows)
        return self._plan

    def plan_of(self, req_ids: Sequence[str]) -> Plan | None:
        """The plan of the step before, if that had these requests."""
        return self._plan if self._plan is not None and self._plan.req_ids == req_ids else None

    def forget_plan(self) -> None:
        """Make the next one afresh: the pool has changed."""
        self.history.fold()  # what is still to be counted holds on to the old tensors
        self._plan = None

    def proxies_in_use(self, live: Collection[str]) -> set[ServedProxy]:
        """The proxies of requests that may go on."""
        self._set_finished_aside(live)
        return {a.proxy for a in self._live.values() if a.proxy is not None}

    def take(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Counts of requests, which are then forgotten: to be asked for when they have finished.

        `request_ids` are the callers' ids or the ones here; the answer has the ones here.
        Requests without alignment, and unknown ones, are left out.
        """
        if not self._reports:
            return {}
        taken: dict[str, Assignment] = {}
        for req_id in self._ids_here(request_ids):
            assignment = self._finished.pop(req_id, None)
            if assignment is None and (assignment := self._live.get(req_id)) is not None:
                # A step may still be under way for it: its rows must not meet a new owner.
                self._live[req_id] = replace(assignment, slot=DISCARD_SLOT)
                self._plan = None
            if assignment is not None and assignment.slot != DISCARD_SLOT:
                taken[req_id] = assignment
        rows = self.history.read([assignment.slot for assignment in taken.values()])
        answer = {}
        for (req_id, assignment), (tokens, proposed, forced) in zip(
            taken.items(), rows, strict=True
        ):
            assert assignment.proxy is not None
            self._release(req_id, assignment)
            answer[req_id] = {
                "proxy": assignment.proxy.name,
                "version": assignment.proxy.version,
                "proposed": proposed,
                "accepted": tokens - forced,
                "rejected": proposed - (tokens - forced),
                "forced": forced,
            }
        return answer

    def take_traces(self, request_ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """What was traced of requests since the last time, by the ids here; ask before `take`.

        Requests without anything new are left out.
        """
        self.history.fold()
        ids = list(self._ids_here(request_ids))
        return {req_id: entries for req_id in ids if (entries := self.history.take_trace(req_id))}

    def _ids_here(self, request_ids: Iterable[str]) -> Iterable[str]:
        for given in request_ids:
            yield from sorted(self._internal_ids.get(given, ())) or [given]

    def _set_finished_aside(self, live: Collection[str]) -> None:
        for req_id in [r for r in self._live if r not in live]:
            assignment = self._live.pop(req_id)
            if assignment.slot != DISCARD_SLOT:
                self._finished[req_id] = assignment

    def _assignment(
        self, req_id: str, params_of: Callable[[str], Any], find: FindProxy
    ) -> Assignment:
        # A runner that drops preempted requests shows them again as new ones.
        preempted = self._finished.pop(req_id, None)
        self._live[req_id] = preempted or self._assign(req_id, params_of(req_id), find)
        return self._live[req_id]

    def _assign(self, req_id: str, params: Any, find: FindProxy) -> Assignment:
        alignment = alignment_of(getattr(params, "extra_args", None))
        plain = Assignment(
            req_id,
            temperature=getattr(params, "temperature", 1.0),
            top_k=max(0, getattr(params, "top_k", 0)),
            top_p=getattr(params, "top_p", 1.0),
            shadowed=alignment.shadow,
        )
        if alignment.proxy is None or not alignment.acts:
            return plain
        proxy = find(alignment.proxy, alignment.version)
        if proxy is None:
            logger.warning(
                "No proxy %r, version %s, is loaded: sampled without one.",
                alignment.proxy,
                alignment.version,
            )
            return plain
        max_rejections = alignment.max_rejections
        if max_rejections is None:
            max_rejections = proxy.config.max_rejections
        stop_ids = {*(params.stop_token_ids or ()), params.eos_token_id} - {None}
        self._internal_ids.setdefault(callers_id(req_id), set()).add(req_id)
        return replace(
            plain,
            proxy=proxy,
            strength=alignment.strength,
            max_rejections=max_rejections,
            key=_random_key() if params.seed is None else noise_key(params.seed),
            is_seeded=params.seed is not None,
            stop_ids=tuple(stop_ids),
            slot=self._new_slot(),
            traced=alignment.trace,
        )

    def _new_slot(self) -> int:
        if not self._free and self._finished:
            self.history.fold()  # its last steps may not have been counted yet
            oldest = next(iter(self._finished))
            self._release(oldest, self._finished.pop(oldest))
        if not self._free:
            size = self.history.size()
            self.history.grow()
            self._free.extend(range(size, 2 * size))
        slot = self._free.pop()
        self.history.open(slot)
        return slot

    def _release(self, req_id: str, assignment: Assignment) -> None:
        self._free.append(assignment.slot)
        self.history.forget_trace(req_id)
        siblings = self._internal_ids[callers_id(req_id)]
        siblings.discard(req_id)
        if not siblings:
            del self._internal_ids[callers_id(req_id)]


def _random_key() -> int:
    """From torch's own generator, which vLLM seeds alike on all tensor-parallel ranks."""
    return int(torch.randint(2**63 - 1, ()))


def callers_id(req_id: str) -> str:
    """The id that the caller gave to the engine, of the engine's own."""
    return _RANDOM_SUFFIX.sub("", _CHILD_PREFIX.sub("", req_id))
