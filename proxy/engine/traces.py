"""Traces: token by token, which candidates were proposed and rejected, in requests with `trace`.

R = rows of one step, K = candidates.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from proxy.acceptance import Decision, accept_costs, arrival_times, joint_cost, proposed_mask
from proxy.engine.device import to_device
from proxy.engine.rows import ProxiedRows, ScoredCandidates
from proxy.request import TRACE_TOKENS, TRACED_REQUESTS

Entry = dict[str, Any]
"""One emitted token; `ProxyGPUWorker.take_traces` says what is in it."""


class Traces:
    """The entries of each request that nobody has taken yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: dict[str, list[Entry]] = {}
        self._num_traced: defaultdict[str, int] = defaultdict(int)  # taken ones included

    def add(
        self,
        rows: ProxiedRows,
        decision: Decision,
        scored: ScoredCandidates,
        counted: list[int],  # the rows of this step that count
    ) -> None:
        """One step. Reads from the device."""
        traced = [row for row in counted if rows.assignments[row].traced]
        index = to_device(traced, torch.int64, self._device)
        entries = _entries_of(rows, decision, scored, index)
        for row, entry in zip(traced, entries, strict=True):
            req_id = rows.assignments[row].req_id
            self._num_traced[req_id] += 1
            if self._num_traced[req_id] <= TRACE_TOKENS:
                self._entries.setdefault(req_id, []).append(entry)
        while len(self._entries) > TRACED_REQUESTS:
            # A later part would be taken for the beginning of the trace: it ends here.
            oldest = next(iter(self._entries))
            del self._entries[oldest]
            self._num_traced[oldest] = TRACE_TOKENS

    def take(self, req_id: str) -> list[Entry]:
        """The entries of a request since the last time."""
        return self._entries.pop(req_id, [])

    def forget(self, req_id: str) -> None:
        """Drop a request that nobody will ask for."""
        self._entries.pop(req_id, None)
        self._num_traced.pop(req_id, None)


def _entries_of(
    rows: ProxiedRows, decision: Decision, scored: ScoredCandidates, index: Tensor
) -> list[Entry]:
    """The entries of some rows of a step: `index` [n] into the rows."""
    settings = rows.settings
    candidates, accept_logits, noise = scored
    times = arrival_times(
        candidates, noise[:, 0], sharpness=settings.sharpness, greedy=settings.greedy
    )
    costs = accept_costs(accept_logits, settings.strength)
    costs = costs if costs.dim() == 3 else costs.unsqueeze(1)  # [A, P, K]
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
        (-joint_cost(costs)).exp(),
        (-costs).exp(),
    )
    names = [[proxy.name for proxy, _ in a.shares] for a in rows.assignments]
    entries = []
    for (
        row,
        slot,
        forced,
        is_proposed,
        is_scored,
        order,
        token_ids,
        probs,
        accepts,
        by_proxy,
    ) in zip(index.tolist(), *(column[index].tolist() for column in columns), strict=True):

        def candidate(slot: int) -> Entry:
            entry = {
                "token_id": token_ids[slot],  # noqa: B023
                "probability": probs[slot],  # noqa: B023
                "accept_probability": accepts[slot] if is_scored[slot] else None,  # noqa: B023
            }
            own = names[row]  # noqa: B023
            if len(own) > 1 and is_scored[slot]:  # noqa: B023
                of_each = zip(own, by_proxy, strict=False)  # noqa: B023
                entry["by_proxy"] = {name: accepts[slot] for name, accepts in of_each}
            return entry

        rejected = [s for s in order if is_proposed[s] and (forced or s != slot)]
        entries.append(
            candidate(slot) | {"forced": forced, "rejected": [candidate(s) for s in rejected]}
        )
    return entries
