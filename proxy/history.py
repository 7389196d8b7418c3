"""What became of aligned tokens: counts and traces, by request and by proxy.

A step only appends what was decided; every now and then, and whenever someone asks, the steps
are folded into counts on the device in one go. Nothing waits for the device until somebody asks.
"""

import time
from collections import defaultdict
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proxy import metrics
from proxy.acceptance import Decision, proposal_times, proposed_mask
from proxy.pool import ServedProxy
from proxy.rows import AlignedRows, Tracing, to_device

DISCARD_SLOT = 0  # where rows are counted that nobody will ask for

_FOLD_STEPS = 128
_FLUSH_SECONDS = 1.0  # between two readings of the totals for the metrics
_TRACE_TOKENS = 4096  # per request; what comes after is dropped
_TRACED_REQUESTS = 1024  # whose traces wait to be taken; the oldest are cut off


class _Record(NamedTuple):
    """One step of the A rows of a plan."""

    rows: AlignedRows
    decision: Decision
    discarded: Tensor | None  # [A] bool
    tracing: Tracing | None


class History:
    """Counts by slot: a row of tokens, proposed, forced for every request in hand."""

    def __init__(self, device: torch.device, *, reports: bool, capacity: int) -> None:
        """
        Args:
            device: where the logits are.
            reports: False on the ranks that must not count a second time.
            capacity: number of slots at the start.
        """
        self._device = device
        self._reports = reports
        self._counts = torch.zeros(capacity + 1, 3, dtype=torch.int64, device=device)
        self._ended = torch.zeros(capacity + 1, dtype=torch.bool, device=device)
        self._ended[DISCARD_SLOT] = True
        self._records: list[_Record] = []
        self._totals: dict[ServedProxy, Tensor] = {}  # [3] int64 since the last flush
        self._shadow_totals: dict[ServedProxy, Tensor] = {}  # [2] int64: tokens, changed
        self._flushed_at = time.monotonic()
        self._traces: dict[str, list[dict[str, Any]]] = {}
        self._num_traced: defaultdict[str, int] = defaultdict(int)

    # --- every step ---

    def record(
        self,
        rows: AlignedRows,
        decision: Decision,
        discarded: Tensor | None,
        tracing: Tracing | None = None,
    ) -> None:
        """Remember what was decided for the rows of a plan.

        Rows in `discarded` ([A] bool: unfinished prefills) will not count, nor will rows after
        their request's end: with asynchronous scheduling one more step is under way by then.
        """
        if self._reports:
            self._records.append(_Record(rows, decision, discarded, tracing))
            if len(self._records) >= _FOLD_STEPS:
                self.fold()

    def record_shadow(self, proxy: ServedProxy, scored: Tensor, changed: Tensor) -> None:
        """[R] bool both: the tokens that a shadow scored, and where it decided otherwise."""
        if self._reports:
            sums = torch.stack((scored.sum(), (scored & changed).sum()))
            self._shadow_totals[proxy] = self._shadow_totals.get(proxy, 0) + sums
            self._flush_if_due()

    # --- now and then ---

    def fold(self) -> None:
        """Add up what the steps since the last time have left."""
        records, self._records = self._records, []
        for _, group in groupby(records, key=lambda record: id(record.rows)):
            self._fold_same_rows(list(group))
        self._flush_if_due()

    def _fold_same_rows(self, records: list[_Record]) -> None:
        """S steps of the same A rows."""
        assignments = records[0].rows.assignments
        slots = self._tensor([a.slot for a in assignments])
        width = max(1, *(len(a.stop_ids) for a in assignments))
        stop_ids = self._tensor(
            [[*a.stop_ids, *[-1] * (width - len(a.stop_ids))] for a in assignments]
        )
        token_ids = torch.stack([record.decision.token_ids for record in records])  # [S, A]
        counted = (~self._ended[slots]).expand(len(records), -1).clone()
        for step, record in enumerate(records):
            if record.discarded is not None:
                counted[step] &= ~record.discarded
        stops = (token_ids.unsqueeze(-1) == stop_ids).any(-1) & counted
        counted &= (stops.cumsum(0) - stops.long()) == 0
        proposed = torch.stack([record.decision.num_proposed for record in records])
        forced = torch.stack([record.decision.forced for record in records])
        sums = torch.stack(
            (counted.sum(0), (proposed * counted).sum(0), (forced & counted).sum(0)), dim=-1
        )  # [A, 3]
        self._counts.index_add_(0, slots, sums)
        self._ended[slots] |= stops.any(0)
        by_proxy: defaultdict[ServedProxy, list[int]] = defaultdict(list)
        for row, assignment in enumerate(assignments):
            if assignment.proxy is not None:
                by_proxy[assignment.proxy].append(row)
        for proxy, rows in by_proxy.items():
            total = sums[self._tensor(rows)].sum(0)
            self._totals[proxy] = self._totals.get(proxy, 0) + total
        if records[0].tracing is not None:
            self._trace(records, counted.tolist())

    def _trace(self, records: list[_Record], counted: list[list[bool]]) -> None:
        for record, was_counted in zip(records, counted, strict=True):
            rows = [
                row
                for row, assignment in enumerate(record.rows.assignments)
                if assignment.traced and was_counted[row]
            ]
            for row, entry in zip(rows, _trace_entries(record, self._tensor(rows)), strict=True):
                req_id = record.rows.assignments[row].req_id
                self._num_traced[req_id] += 1
                if self._num_traced[req_id] <= _TRACE_TOKENS:
                    self._traces.setdefault(req_id, []).append(entry)
        while len(self._traces) > _TRACED_REQUESTS:
            # What came later would be taken for what is gone: the trace ends here.
            oldest = next(iter(self._traces))
            del self._traces[oldest]
            self._num_traced[oldest] = _TRACE_TOKENS

    def _flush_if_due(self) -> None:
        # Reading totals waits for an accelerator.
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Bring the Prometheus counters up to date."""
        for proxy, total in self._totals.items():
            tokens, proposed, forced = total.tolist()
            metrics.add(proxy.name, proxy.version, tokens=tokens, proposed=proposed, forced=forced)
        for proxy, total in self._shadow_totals.items():
            tokens, changed = total.tolist()
            metrics.add_shadow(proxy.name, proxy.version, tokens=tokens, changed=changed)
        self._totals.clear()
        self._shadow_totals.clear()
        self._flushed_at = time.monotonic()

    # --- slots ---

    def size(self) -> int:
        """Number of slots, the discard slot included."""
        return len(self._counts)

    def grow(self) -> None:
        """Twice as many slots."""
        self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
        self._ended = torch.cat((self._ended, torch.zeros_like(self._ended)))

    def open(self, slot: int) -> None:
        """A new request counts here."""
        self._counts[slot] = 0
        self._ended[slot] = False

    def read(self, slots: list[int]) -> list[list[int]]:
        """Tokens, proposed and forced of each slot, up to this moment."""
        self.fold()
        return self._counts[slots].tolist()

    def take_trace(self, req_id: str) -> list[dict[str, Any]]:
        """The entries since the last time; call `fold` before."""
        return self._traces.pop(req_id, [])

    def forget_trace(self, req_id: str) -> None:
        """Nobody will ask any more."""
        self._traces.pop(req_id, None)
        self._num_traced.pop(req_id, None)

    def _tensor(self, data: list[Any]) -> Tensor:
        return to_device(data, torch.int64, self._device)


def _trace_entries(record: _Record, rows: Tensor) -> list[dict[str, Any]]:
    """What was put to the proxy at one step, for some of the rows; reads from the device."""
    assert record.tracing is not None
    candidates, accept_logits, noise = record.tracing
    settings, decision = record.rows.settings, record.decision
    times = proposal_times(candidates, noise[:, 0], settings.greedy)
    strength = 1.0 if settings.strength is None else settings.strength.unsqueeze(-1)
    accept_probs = (-strength * F.softplus(-accept_logits)).exp()
    columns = (
        decision.slots,
        decision.forced,
        proposed_mask(times, decision),
        times.argsort(-1),
        candidates.token_ids,
        candidates.logprobs.exp(),
        accept_probs,
    )
    entries = []
    for slot, forced, proposed, order, token_ids, probs, accepts in zip(
        *(column[rows].tolist() for column in columns), strict=True
    ):

        def candidate(slot: int) -> dict[str, Any]:
            return {
                "token_id": token_ids[slot],  # noqa: B023
                "probability": probs[slot],  # noqa: B023
                "accept_probability": accepts[slot] if proposed[slot] else None,  # noqa: B023
            }

        rejected = [s for s in order if proposed[s] and (forced or s != slot)]
        entries.append(
            candidate(slot) | {"forced": forced, "rejected": [candidate(s) for s in rejected]}
        )
    return entries
