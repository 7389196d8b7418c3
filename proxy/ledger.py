"""Who is aligned by which proxy in the current batch, and what became of it.

`Ledger.plan` runs once per step on the host and is cached while the batch stays the same;
`Ledger.record` runs on the device and never waits for it. A request is resolved once, when it is
first seen: it keeps the proxy object, and so the version, that it began with, whatever is loaded
or unloaded meanwhile. Nothing here imports vllm.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxy import metrics
from proxy.acceptance import Decision
from proxy.network import ProxyNetwork
from proxy.request import alignment_of

logger = logging.getLogger(__name__)

# vLLM's ids: the caller's id and 8 hex digits; the i-th of n samples has "i_" in front.
_CHILD_PREFIX = re.compile(r"^\d+_")
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

_DISCARD_SLOT = 0  # where rows are counted that nobody will ask for
_FLUSH_SECONDS = 1.0  # between two readings of an accelerator's totals for the metrics


@dataclass(eq=False)
class ServedProxy:
    """A proxy on the worker's device."""

    name: str
    version: str
    network: ProxyNetwork
    table: Tensor  # [V, width] float32, the candidate half of every token
    totals: Tensor  # [3] int64: tokens, proposed, forced; since the metrics were last updated


class Assignment(NamedTuple):
    """What one request gets, settled when it is first seen."""

    proxy: ServedProxy
    strength: float
    max_rejections: int
    stop_ids: tuple[int, ...]  # tokens that end the request
    slot: int  # its row in the counts


class Group(NamedTuple):
    """The rows of a batch that are aligned by the same proxy, G of them."""

    proxy: ServedProxy
    rows: list[int]
    row_index: Tensor  # [G] int64, `rows` on the device
    strength: Tensor  # [G] float32
    max_rejections: Tensor  # [G] int64
    slots: Tensor  # [G] int64
    stop_ids: Tensor  # [G, S] int64, padded with -1


class Plan(NamedTuple):
    """How the rows of a batch are sampled; a row is a request, in the order of `req_ids`."""

    req_ids: list[str]
    groups: list[Group]
    plain_rows: list[int]
    plain_index: Tensor  # [P] int64, `plain_rows` on the device


class Ledger:
    """Assignments and counts of the requests that a worker has in hand, or had lately."""

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
        self._live: dict[str, Assignment | None] = {}  # None = plain
        self._finished: dict[str, Assignment] = {}  # oldest first
        self._internal_ids: dict[str, set[str]] = {}  # caller's id -> ids here
        self._free = list(range(capacity, _DISCARD_SLOT, -1))
        self._counts = torch.zeros(capacity + 1, 3, dtype=torch.int64, device=device)
        self._ended = torch.zeros(capacity + 1, dtype=torch.bool, device=device)
        self._ended[_DISCARD_SLOT] = True
        self._plan: Plan | None = None
        self._unflushed: set[ServedProxy] = set()
        self._flushed_at = 0.0

    def plan(
        self,
        req_ids: Sequence[str],
        params_of: Callable[[str], Any],  # -> vLLM's SamplingParams, or None
        live: Collection[str],  # every request the worker knows, scheduled in this step or not
        proxies: Mapping[str, ServedProxy],
    ) -> Plan:
        """The plan of a batch; the very same object while `req_ids` is."""
        if self._plan is not None and self._plan.req_ids == req_ids:
            return self._plan
        for req_id in [r for r in self._live if r not in live]:
            assignment = self._live.pop(req_id)
            if assignment is not None and assignment.slot != _DISCARD_SLOT:
                self._finished[req_id] = assignment
        by_proxy: dict[ServedProxy, list[tuple[int, Assignment]]] = {}
        plain_rows: list[int] = []
        for row, req_id in enumerate(req_ids):
            if req_id not in self._live:
                self._live[req_id] = self._assign(req_id, params_of(req_id), proxies)
            assignment = self._live[req_id]
            if assignment is None:
                plain_rows.append(row)
            else:
                by_proxy.setdefault(assignment.proxy, []).append((row, assignment))
        groups = [self._group(proxy, members) for proxy, members in by_proxy.items()]
        plain_index = self._tensor(plain_rows, torch.int64)
        self._plan = Plan(list(req_ids), groups, plain_rows, plain_index)
        return self._plan

    def record(self, group: Group, decision: Decision, discarded: Tensor) -> None:
        """Count what was decided for a group.

        Rows in `discarded` ([R] bool: unfinished prefills) do not count, nor do rows after the
        request's end: with asynchronous scheduling one more step is under way by then.
        """
        if not self._reports:
            return
        counted = ~discarded[group.row_index] & ~self._ended[group.slots]
        step = torch.stack(
            (counted, decision.num_proposed * counted, decision.forced & counted), dim=-1
        )
        self._counts.index_add_(0, group.slots, step)
        stops = (decision.token_ids.unsqueeze(-1) == group.stop_ids).any(-1)
        self._ended[group.slots] |= stops & counted
        group.proxy.totals += step.sum(0)
        self._unflushed.add(group.proxy)
        # Reading totals waits for an accelerator, so there it happens only now and then.
        now = time.monotonic()
        if self._device.type == "cpu" or now - self._flushed_at > _FLUSH_SECONDS:
            self.flush_metrics()
            self._flushed_at = now

    def flush_metrics(self) -> None:
        """Bring the Prometheus counters up to date."""
        for proxy in self._unflushed:
            tokens, proposed, forced = proxy.totals.tolist()
            proxy.totals.zero_()
            metrics.add(proxy.name, tokens=tokens, proposed=proposed, forced=forced)
        self._unflushed.clear()

    def take(self, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Counts of requests, which are then forgotten: to be asked for when they have finished.

        `request_ids` are the callers' ids or the ones here; the answer has the ones here.
        Requests without alignment, and unknown ones, are left out.
        """
        if not self._reports:
            return {}
        taken: dict[str, Assignment] = {}
        for given in request_ids:
            for req_id in sorted(self._internal_ids.get(given, ())) or [given]:
                assignment = self._finished.pop(req_id, None)
                if assignment is None and (assignment := self._live.get(req_id)) is not None:
                    # A step may still be under way for it: its rows must not meet a new owner.
                    self._live[req_id] = assignment._replace(slot=_DISCARD_SLOT)
                    self._plan = None
                if assignment is not None and assignment.slot != _DISCARD_SLOT:
                    taken[req_id] = assignment
        rows = self._counts[[assignment.slot for assignment in taken.values()]].tolist()
        answer = {}
        for (req_id, assignment), (tokens, proposed, forced) in zip(
            taken.items(), rows, strict=True
        ):
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

    def _assign(
        self, req_id: str, params: Any, proxies: Mapping[str, ServedProxy]
    ) -> Assignment | None:
        alignment = alignment_of(getattr(params, "extra_args", None))
        if alignment is None or alignment.proxy is None:
            return None
        proxy = proxies.get(alignment.proxy)
        if proxy is None:
            logger.warning("No proxy %r is loaded: sampled without one.", alignment.proxy)
            return None
        max_rejections = alignment.max_rejections
        if max_rejections is None:
            max_rejections = proxy.network.config.max_rejections
        stop_ids = {*(params.stop_token_ids or ()), params.eos_token_id} - {None}
        self._internal_ids.setdefault(_callers_id(req_id), set()).add(req_id)
        return Assignment(
            proxy, alignment.strength, max_rejections, tuple(stop_ids), self._new_slot()
        )

    def _new_slot(self) -> int:
        if not self._free and self._finished:
            oldest = next(iter(self._finished))
            self._release(oldest, self._finished.pop(oldest))
        if not self._free:
            size = len(self._counts)
            self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
            self._ended = torch.cat((self._ended, torch.zeros_like(self._ended)))
            self._free.extend(range(size, 2 * size))
        slot = self._free.pop()
        self._counts[slot] = 0
        self._ended[slot] = False
        return slot

    def _release(self, req_id: str, assignment: Assignment) -> None:
        self._free.append(assignment.slot)
        siblings = self._internal_ids[_callers_id(req_id)]
        siblings.discard(req_id)
        if not siblings:
            del self._internal_ids[_callers_id(req_id)]

    def _group(self, proxy: ServedProxy, members: list[tuple[int, Assignment]]) -> Group:
        rows = [row for row, _ in members]
        assignments = [assignment for _, assignment in members]
        width = max(1, *(len(a.stop_ids) for a in assignments))
        return Group(
            proxy=proxy,
            rows=rows,
            row_index=self._tensor(rows, torch.int64),
            strength=self._tensor([a.strength for a in assignments], torch.float32),
            max_rejections=self._tensor([a.max_rejections for a in assignments], torch.int64),
            slots=self._tensor([a.slot for a in assignments], torch.int64),
            stop_ids=self._tensor(
                [[*a.stop_ids, *[-1] * (width - len(a.stop_ids))] for a in assignments],
                torch.int64,
            ),
        )

    def _tensor(self, data: list[Any], dtype: torch.dtype) -> Tensor:
        """Host data on the device, without waiting for the device."""
        tensor = torch.tensor(data, dtype=dtype)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _callers_id(req_id: str) -> str:
    return _RANDOM_SUFFIX.sub("", _CHILD_PREFIX.sub("", req_id))
