"""What became of aligned tokens: counts and traces, by request and by proxy.

A step only appends what was decided, on the device. Whenever someone asks, and every hundred steps
or so, the steps are brought to the host and added up; only then does anything wait for the device.
On a CPU what was decided is copied instead: small tensors that stay would lie scattered where the
next step's logits could have been, and make these wander through cold memory.
"""

import operator
import time
from collections import defaultdict
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proxy import metrics
from proxy.acceptance import Decision, proposal_times, proposed_mask
from proxy.pool import ServedProxy
from proxy.rows import AlignedRows, Tracing, to_device

DISCARD_SLOT = 0  # where rows are counted that nobody will ask for
TRACE_TOKENS = 4096  # per request; what comes after is dropped
TRACED_REQUESTS = 1024  # whose traces wait to be taken; the oldest are cut off

_FOLD_STEPS = 128
_FLUSH_SECONDS = 1.0  # between two readings of the totals for the metrics


class _Record(NamedTuple):
    """One step of the A rows of a plan."""

    rows: AlignedRows
    decision: Decision | None  # None = it is in the log, and nobody wants more
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
        self._counts = [[0, 0, 0] for _ in range(capacity + 1)]  # tokens, proposed, forced
        self._ended = [False] * (capacity + 1)
        self._ended[DISCARD_SLOT] = True
        self._records: list[_Record] = []
        # On a CPU: the columns of the records' decisions.
        self._log = np.empty((_FOLD_STEPS, 4, 0), np.int64) if device.type == "cpu" else None
        self._totals: dict[ServedProxy, list[int]] = {}  # the three since the last flush
        self._shadow_totals: dict[ServedProxy, Tensor] = {}  # [2] int64: tokens, changed
        self._steps, self._seconds = 0, 0.0  # since the last flush
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
            kept = None if self._copied(decision) and tracing is None else decision
            self._records.append(_Record(rows, kept, discarded, tracing))
            if len(self._records) >= _FOLD_STEPS:
                self.fold()

    def record_seconds(self, seconds: float) -> None:
        """What a step of the hook took, of the host's time."""
        self._steps += 1
        self._seconds += seconds

    def record_shadow(self, proxy: ServedProxy, scored: Tensor, changed: Tensor) -> None:
        """[R] bool both: the tokens that a shadow scored, and where it decided otherwise."""
        if self._reports:
            sums = torch.stack((scored.sum(), (scored & changed).sum()))
            self._shadow_totals[proxy] = self._shadow_totals.get(proxy, 0) + sums
            self._flush_if_due()

    def _copied(self, decision: Decision) -> bool:
        """Put the next record's decision into the log, if there is one."""
        if self._log is None:
            return False
        columns = decision.on_host
        size = columns.shape[1]
        if size > self._log.shape[2]:
            self.fold()
            self._log = np.empty((_FOLD_STEPS, 4, size), np.int64)
        self._log[len(self._records), :, :size] = columns
        return True

    # --- now and then ---

    def fold(self) -> None:
        """Add up what the steps since the last time have left."""
        records, self._records = self._records, []
        start = 0
        for _, group in groupby(records, key=lambda record: id(record.rows)):
            same = list(group)
            self._fold_same_rows(same, self._columns(same, start))
            start += len(same)
        self._flush_if_due()

    def _columns(self, records: list[_Record], start: int) -> Any:
        """Those of S records of the same A rows, on the host: [S, 4, A]."""
        if self._log is not None:
            return self._log[start : start + len(records), :, : len(records[0].rows.rows)]
        decisions = [record.decision for record in records if record.decision is not None]
        return torch.stack([decision.columns for decision in decisions]).cpu().numpy()

    def _fold_same_rows(self, records: list[_Record], columns: Any) -> None:
        """S steps of the same A rows, and what was decided: [S, 4, A]."""
        _, token_ids, proposed, forced = columns.swapaxes(0, 1)  # [S, A] each
        assignments = records[0].rows.assignments
        slots = [assignment.slot for assignment in assignments]
        most = max(len(assignment.stop_ids) for assignment in assignments)
        stops = np.array(  # [A, most]; no token is -1
            [[*a.stop_ids, *[-1] * (most - len(a.stop_ids))] for a in assignments], np.int64
        )
        counted = np.tile(~np.array([self._ended[slot] for slot in slots]), (len(records), 1))
        for step, record in enumerate(records):
            if record.discarded is not None:
                counted[step] &= ~record.discarded.cpu().numpy()
        ends = counted & (token_ids[:, :, None] == stops).any(-1)
        counted &= ends.cumsum(0) - ends == 0  # up to the first end
        parts = counted, counted * proposed, counted * forced
        sums = np.stack([part.sum(0) for part in parts], -1).tolist()  # [A, 3]
        for assignment, ended, more in zip(assignments, ends.any(0).tolist(), sums, strict=True):
            self._ended[assignment.slot] |= ended
            totals = [self._counts[assignment.slot]]
            if assignment.proxy is not None:
                totals.append(self._totals.setdefault(assignment.proxy, [0, 0, 0]))
            for total in totals:
                total[:] = map(operator.add, total, more)
        if records[0].tracing is not None:
            for record, rows in zip(records, counted, strict=True):
                self._trace(record, np.flatnonzero(rows).tolist())

    def _trace(self, record: _Record, counted: list[int]) -> None:
        assignments = record.rows.assignments
        rows = [row for row in counted if assignments[row].traced]
        index = to_device(rows, torch.int64, self._device)
        for row, entry in zip(rows, _trace_entries(record, index), strict=True):
            req_id = assignments[row].req_id
            self._num_traced[req_id] += 1
            if self._num_traced[req_id] <= TRACE_TOKENS:
                self._traces.setdefault(req_id, []).append(entry)
        while len(self._traces) > TRACED_REQUESTS:
            # What came later would be taken for what is gone: the trace ends here.
            oldest = next(iter(self._traces))
            del self._traces[oldest]
            self._num_traced[oldest] = TRACE_TOKENS

    def _flush_if_due(self) -> None:
        # Reading totals waits for an accelerator.
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Bring the Prometheus counters up to date."""
        for proxy, (tokens, proposed, forced) in self._totals.items():
            metrics.add(proxy.name, proxy.version, tokens=tokens, proposed=proposed, forced=forced)
        for proxy, sums in self._shadow_totals.items():
            tokens, changed = sums.tolist()
            metrics.add_shadow(proxy.name, proxy.version, tokens=tokens, changed=changed)
        if self._reports:
            metrics.add_steps(self._steps, self._seconds)
        self._steps, self._seconds = 0, 0.0
        self._totals.clear()
        self._shadow_totals.clear()
        self._flushed_at = time.monotonic()

    # --- slots ---

    def size(self) -> int:
        """Number of slots, the discard slot included."""
        return len(self._counts)

    def grow(self) -> None:
        """Twice as many slots."""
        size = self.size()
        self._counts += [[0, 0, 0] for _ in range(size)]
        self._ended += [False] * size

    def open(self, slot: int) -> None:
        """A new request counts here."""
        self._counts[slot] = [0, 0, 0]
        self._ended[slot] = False

    def read(self, slots: list[int]) -> list[list[int]]:
        """Tokens, proposed and forced of each slot, up to this moment."""
        self.fold()
        return [self._counts[slot] for slot in slots]

    def take_trace(self, req_id: str) -> list[dict[str, Any]]:
        """The entries since the last time; call `fold` before."""
        return self._traces.pop(req_id, [])

    def forget_trace(self, req_id: str) -> None:
        """Nobody will ask any more."""
        self._traces.pop(req_id, None)
        self._num_traced.pop(req_id, None)


def _trace_entries(record: _Record, rows: Tensor) -> list[dict[str, Any]]:
    """What was put to the proxy at one step, for some of the rows; reads from the device."""
    decision, settings = record.decision, record.rows.settings
    assert decision is not None and record.tracing is not None
    candidates, accept_logits, noise = record.tracing
    times = proposal_times(
        candidates, noise[:, 0], sharpness=settings.sharpness, greedy=settings.greedy
    )
    strength = 1.0 if settings.strength is None else settings.strength.unsqueeze(-1)
    accept_probs = (-strength * F.softplus(-accept_logits)).exp()
    proposed = proposed_mask(times, decision)
    has_choice = (candidates.logprobs > -torch.inf).sum(-1, keepdim=True) > 1
    columns = (
        decision.slots,
        decision.forced,
        proposed,
        proposed & has_choice,
        times.argsort(-1),
        candidates.token_ids,
        candidates.logprobs.exp(),
        accept_probs,
    )
    entries = []
    for slot, forced, is_proposed, is_asked, order, token_ids, probs, accepts in zip(
        *(column[rows].tolist() for column in columns), strict=True
    ):

        def candidate(slot: int) -> dict[str, Any]:
            return {
                "token_id": token_ids[slot],  # noqa: B023
                "probability": probs[slot],  # noqa: B023
                "accept_probability": accepts[slot] if is_asked[slot] else None,  # noqa: B023
            }

        rejected = [s for s in order if is_proposed[s] and (forced or s != slot)]
        entries.append(
            candidate(slot) | {"forced": forced, "rejected": [candidate(s) for s in rejected]}
        )
    return entries
