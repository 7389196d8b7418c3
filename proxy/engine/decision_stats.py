"""Counts of what was decided: by request, and by proxy for the metrics.

A step only records its decisions. Every hundred steps or so, and whenever somebody asks, the records
are added up on the host.

An accelerator copies each step's decisions to the host and waits for nothing; adding up waits for
the copies that it needs. On a CPU the decisions are copied into one array: many small tensors that
stay would lie scattered where the next step's logits could have been, and slow these down.
"""

import time
from collections.abc import Collection
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proxy.acceptance import Decision
from proxy.engine import metrics
from proxy.engine.assignment import Assignment, Counts
from proxy.engine.device import HostCopy
from proxy.engine.pool import ServedProxy
from proxy.engine.rows import ProxiedRows, ScoredCandidates
from proxy.engine.traces import Traces

_AGGREGATE_STEPS = 128
_FLUSH_SECONDS = 1.0  # between two updates of the metrics


class _Record(NamedTuple):
    """One step of A rows."""

    rows: ProxiedRows
    copy: HostCopy | None  # [4 or 5, A]; None = the columns are in the log
    discarded: Tensor | None  # [A] bool, on a CPU; otherwise the fifth column
    decision: Decision | None  # for traces
    scored: ScoredCandidates | None  # for traces


class DecisionStats:
    """Adds decisions to the counts of their requests (`Assignment.counts`) and to the metrics."""

    def __init__(self, device: torch.device, *, reports: bool) -> None:
        """
        Args:
            device: where the logits are.
            reports: False on the ranks that must not count a second time.
        """
        self._reports = reports
        self.traces = Traces(device)
        self._records: list[_Record] = []
        # On a CPU: the columns of the records' decisions.
        self._log = np.empty((_AGGREGATE_STEPS, 4, 0), np.int64) if device.type == "cpu" else None
        self._totals: dict[ServedProxy, Counts] = {}  # since the last flush
        self._shadow_totals: dict[ServedProxy, Tensor] = {}  # [2] int64: tokens, changed
        self._steps, self._seconds = 0, 0.0  # since the last flush
        self._flushed_at = time.monotonic()

    # --- every step ---

    def record(
        self,
        rows: ProxiedRows,
        decision: Decision,
        discarded: Tensor | None,
        scored: ScoredCandidates | None = None,
    ) -> None:
        """Record the decisions of one step.

        Args:
            rows: A rows of the batch.
            decision: theirs.
            discarded: [A] bool, rows of unfinished prefills and after rejected drafts, which do not
                count. Rows after the end of their request do not count either: asynchronous
                scheduling runs one more step, and a draft may go beyond the end.
            scored: what the decisions were made from, where a request wants a trace.
        """
        if not self._reports:
            return
        copy = None
        if self._log is not None:
            self._write_to_log(decision)
        elif discarded is None:
            copy = HostCopy(decision.columns)
        else:
            copy = HostCopy(torch.cat((decision.columns, discarded.long().unsqueeze(0))))
            discarded = None
        traced_decision = None if scored is None else decision
        self._records.append(_Record(rows, copy, discarded, traced_decision, scored))
        if len(self._records) >= _AGGREGATE_STEPS:
            self.aggregate(needed=())  # waits for nothing

    def record_seconds(self, seconds: float) -> None:
        """Record the host's time of one step of the hook."""
        self._steps += 1
        self._seconds += seconds

    def record_shadow(self, proxy: ServedProxy, scored: Tensor, changed: Tensor) -> None:
        """Record one step of a shadow: [R] bool both, tokens scored, tokens decided otherwise."""
        if self._reports:
            sums = torch.stack((scored.sum(), (scored & changed).sum()))
            self._shadow_totals[proxy] = self._shadow_totals.get(proxy, 0) + sums
            self._flush_if_due()

    def _write_to_log(self, decision: Decision) -> None:
        assert self._log is not None
        columns = decision.on_host
        size = columns.shape[1]
        if size > self._log.shape[2]:
            self.aggregate()
            self._log = np.empty((_AGGREGATE_STEPS, 4, size), np.int64)
        self._log[len(self._records), :, :size] = columns

    # --- now and then ---

    def aggregate(self, needed: Collection[Counts] | None = None) -> None:
        """Add up the recorded steps; with `needed`, at least those that may change these counts.

        Steps whose decisions have reached the host are added up in any case. The last steps of a
        request whose end is among them need not be waited for.
        """
        self._add_up(self._num_arrived())
        num_steps = len(self._records)
        if needed is not None:
            waiting = {id(counts) for counts in needed if not counts.closed}
            while num_steps > 0 and waiting.isdisjoint(
                id(assignment.counts)
                for assignment in self._records[num_steps - 1].rows.assignments
            ):
                num_steps -= 1
        self._add_up(num_steps)
        self._flush_if_due()

    def _num_arrived(self) -> int:
        """How many steps, from the oldest on, are on the host."""
        for step, record in enumerate(self._records):
            if record.copy is not None and not record.copy.is_done():
                return step
        return len(self._records)

    def _add_up(self, num_steps: int) -> None:
        """Add up the oldest steps."""
        records, self._records = self._records[:num_steps], self._records[num_steps:]
        start = 0
        for _, group in groupby(records, key=lambda record: id(record.rows)):
            steps = list(group)
            if self._log is None:
                copies = [record.copy.numpy() for record in steps if record.copy is not None]
                columns = np.stack([copy[:4] for copy in copies])
                discarded = [copy[4].astype(bool) if len(copy) > 4 else None for copy in copies]
            else:
                columns = self._log[start : start + len(steps), :, : len(steps[0].rows.rows)]
                masks = [record.discarded for record in steps]
                discarded = [None if mask is None else mask.numpy() for mask in masks]
            self._add_up_same_rows(steps, columns, discarded)
            start += len(steps)

    def _add_up_same_rows(
        self,
        records: list[_Record],  # S steps of the same A rows
        columns: Any,  # [S, 4, A], those of their decisions
        discarded: list[Any],  # S times [A] bool, or None
    ) -> None:
        _, token_ids, proposed, forced = columns.swapaxes(0, 1)  # [S, A] each
        assignments = records[0].rows.assignments
        counted = np.tile([not a.counts.closed for a in assignments], (len(records), 1))
        for step, mask in enumerate(discarded):
            if mask is not None:
                counted[step] &= ~mask
        ends = counted & (token_ids[:, :, None] == _stop_ids(assignments)).any(-1)
        counted &= _count_before(ends, assignments) == 0  # up to the first end
        left = np.array([a.max_tokens - a.counts.tokens for a in assignments])
        counted &= _count_before(counted, assignments) < left
        parts = counted, counted * proposed, counted * forced
        sums = np.stack([part.sum(0) for part in parts], -1).tolist()  # [A, 3]
        for assignment, is_end, numbers in zip(
            assignments, ends.any(0).tolist(), sums, strict=True
        ):
            assignment.counts.add(*numbers)
            assignment.counts.closed |= is_end
            for proxy, _ in assignment.shares:
                self._totals.setdefault(proxy, Counts()).add(*numbers)
        for record, rows in zip(records, counted, strict=True):
            if record.decision is not None and record.scored is not None:
                indices = np.flatnonzero(rows).tolist()
                self.traces.add(record.rows, record.decision, record.scored, indices)

    def _flush_if_due(self) -> None:
        # Reading totals waits for an accelerator.
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Bring the Prometheus counters up to date."""
        for proxy, total in self._totals.items():
            metrics.add(
                proxy.name,
                proxy.version,
                tokens=total.tokens,
                proposed=total.proposed,
                forced=total.forced,
            )
        for proxy, sums in self._shadow_totals.items():
            tokens, changed = sums.tolist()
            metrics.add_shadow(proxy.name, proxy.version, tokens=tokens, changed=changed)
        if self._reports:
            metrics.add_steps(self._steps, self._seconds)
        self._steps, self._seconds = 0, 0.0
        self._totals.clear()
        self._shadow_totals.clear()
        self._flushed_at = time.monotonic()


def _count_before(x: Any, assignments: list[Assignment]) -> Any:
    """How many rows of the same request are True before each row: [S, A] bool -> [S, A].

    A request whose tokens were drafted has several rows in a step, one after another.
    """
    x = x.astype(np.int64)
    is_first = [i == 0 or a is not assignments[i - 1] for i, a in enumerate(assignments)]
    starts = np.flatnonzero(is_first)
    sizes = np.diff(starts, append=len(assignments))
    in_steps = np.add.reduceat(x, starts, axis=1)  # [S, requests]
    earlier_steps = (in_steps.cumsum(0) - in_steps).repeat(sizes, 1)
    earlier_rows = x.cumsum(1) - x
    return earlier_steps + earlier_rows - earlier_rows[:, starts].repeat(sizes, 1)


def _stop_ids(assignments: list[Assignment]) -> Any:
    """The tokens that end each request: [A, most of them]; -1, which is no token, fills the rest."""
    size = max(len(assignment.stop_ids) for assignment in assignments)
    rows = [[*a.stop_ids, *[-1] * (size - len(a.stop_ids))] for a in assignments]
    return np.array(rows, np.int64)
