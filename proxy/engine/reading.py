"""Reads a given response: a request whose prompt ends with the response.

`WorkerAlignment.read` says where the response begins and which nucleus is meant. During the prefill
the worker takes the hidden states of the response's tokens, chunk by chunk, computes their logits,
and keeps the positions that leave a choice until somebody takes them.

With a `ScoreRequest` the probe scores the response instead (`proxy.probe`), and its score is all that
is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from proxy.positions import Positions, choices, joined, nucleus_of
from proxy.request import ReadRequest, ScoreRequest, alignment_of, caller_id

MAX_BYTES = 2**28
"""Of positions that nobody has taken; beyond it the oldest are forgotten."""
MAX_SCORES = 2**14
"""That nobody has taken."""
_ROWS = 256  # positions whose logits are computed at once


@dataclass
class _Reading:
    """A request whose prefill is not finished."""

    spec: ReadRequest | ScoreRequest
    token_ids: list[int]  # of the prompt, the response at its end
    computed: int = 0  # tokens before this step
    scheduled: int = 0  # tokens of this step
    taken: int = (
        0  # tokens whose states were taken; a preempted request computes some of them again
    )
    parts: list[Positions] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)  # the probe's, []


class Reader:
    """The requests that a worker reads, and what it has read."""

    def __init__(self, compute_logits: Callable[[Tensor], Any], *, reports: bool) -> None:
        """
        Args:
            compute_logits: hidden states [R, H] -> logits [R, V]; None on all tensor-parallel ranks but the first.
            reports: whether this is the rank that keeps positions.
        """
        self._compute_logits, self._reports = compute_logits, reports
        self._under_way: dict[str, _Reading] = {}
        self._done: dict[str, Positions] = {}  # oldest first
        self._scores: dict[str, Tensor] = {}  # the same
        self.probe: Tensor | None = None
        """The probe's weights [H] in float32; None = there is no probe."""

    @property
    def is_busy(self) -> bool:
        """Whether a prefill is under way that is to be read."""
        return bool(self._under_way)

    def schedule(self, scheduler_output: Any) -> None:
        """Note what vLLM has scheduled for the next step."""
        for new in scheduler_output.scheduled_new_reqs:
            spec = alignment_of(getattr(new.sampling_params, "extra_args", None)).read
            if spec is not None and new.prompt_token_ids:
                # The second model runner shows a preempted request as a new one.
                reading = self._under_way.setdefault(
                    new.req_id, _Reading(spec, new.prompt_token_ids)
                )
                reading.computed = new.num_computed_tokens
        for req_id in scheduler_output.finished_req_ids:  # aborted
            self._under_way.pop(req_id, None)
        if not self._under_way:
            return
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in self._under_way:
                self._under_way[req_id].computed = computed
        for req_id, reading in self._under_way.items():
            reading.scheduled = scheduler_output.num_scheduled_tokens.get(req_id, 0)

    def read(self, req_ids: Sequence[str], scheduled: Sequence[int], hidden: Tensor) -> None:
        """Take a step's hidden states [T, H]: `scheduled` rows of each request, in this order."""
        first = 0
        for req_id, count in zip(req_ids, scheduled, strict=True):
            if req_id in self._under_way:
                self._read(req_id, hidden[first : first + count])
            first += count

    def take(self, request_ids: Sequence[str]) -> dict[str, Positions]:
        """The positions of finished requests, by the callers' ids; other requests are left out."""
        return {req_id: self._done.pop(req_id) for req_id in request_ids if req_id in self._done}

    def take_scores(self, request_ids: Sequence[str]) -> dict[str, float]:
        """The probe's scores of finished requests, by the callers' ids; other requests are left out."""
        scores = {r: self._scores.pop(r) for r in request_ids if r in self._scores}
        values = torch.stack([*scores.values()]).tolist() if scores else []
        return dict(zip(scores, values, strict=True))

    def _read(self, req_id: str, hidden: Tensor) -> None:
        reading = self._under_way[req_id]
        if isinstance(reading.spec, ReadRequest):
            self._add_positions(reading, reading.spec, hidden)
        else:
            self._add_sum(reading, hidden)
        reading.taken = max(reading.taken, reading.computed + len(hidden))
        if reading.taken >= len(reading.token_ids):
            del self._under_way[req_id]
            self._finish(caller_id(req_id), reading)

    def _add_sum(self, reading: _Reading, hidden: Tensor) -> None:
        # A token's state is the one after it was read: its own row.
        if self._reports and self.probe is not None:
            begin = max(reading.spec.start, reading.taken)
            rows = hidden[max(0, begin - reading.computed) :]
            reading.sums.append((rows.float() @ self.probe).sum())

    def _add_positions(self, reading: _Reading, spec: ReadRequest, hidden: Tensor) -> None:
        ids, before = reading.token_ids, reading.computed
        # A token's position is the row that it would be drawn from: the one before its own.
        begin = max(before, spec.start - 1, reading.taken)
        end = min(before + len(hidden), len(ids) - 1)
        for start in range(begin, end, _ROWS):
            stop = min(start + _ROWS, end)
            rows = hidden[start - before : stop - before]
            logits = self._compute_logits(rows)
            if not self._reports:
                continue
            targets = torch.tensor(ids[start + 1 : stop + 1], device=rows.device)
            owners = torch.zeros_like(targets)
            reading.parts.append(choices(rows, nucleus_of(logits, spec), targets, owners, 1))

    def _finish(self, request_id: str, reading: _Reading) -> None:
        if reading.parts:
            self._done[request_id] = _summed(joined(reading.parts))
            self._forget_oldest()
        elif reading.sums:
            length = max(1, len(reading.token_ids) - reading.spec.start)
            self._scores[request_id] = torch.stack(reading.sums).sum() / length
            if len(self._scores) > MAX_SCORES:
                del self._scores[next(iter(self._scores))]

    def _forget_oldest(self) -> None:
        sizes = {r: sum(t.nbytes for t in positions) for r, positions in self._done.items()}
        total = sum(sizes.values())
        for req_id, size in sizes.items():
            if total <= MAX_BYTES:
                return
            del self._done[req_id]
            total -= size


def _summed(parts: Positions) -> Positions:
    """The parts of one response as one response."""
    return parts._replace(
        **{
            name: getattr(parts, name).sum(0, keepdim=True)
            for name in ("counts", "tokens", "outside")
        }
    )
