"""How the rows of one batch are sampled: made on the host when the batch changes, used every step.

R = logits rows, P = rows that no proxy decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.engine.assignment import Assignment
from proxy.engine.device import to_device
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.engine.rows import ProxiedRows


class BatchPlan(NamedTuple):
    """How the rows of a batch are sampled."""

    req_ids: list[str]  # of each row; a request with drafted tokens has several
    proxied: ProxiedRows | None  # None, and no shadows: vLLM samples all rows
    unproxied_rows: list[int]
    unproxied_index: Tensor  # [P] int64, `unproxied_rows` on the device
    divisors: Tensor | None  # [R] float32, the logits are divided by them; None = 1 everywhere
    shadows: list[ProxiedRows]  # one for each shadow proxy: the rows that it scores

    def new_tokens(self, decided: Tensor | None) -> Tensor:
        """[R] int64 with the tokens [A] that proxies decided; those of other rows are to be filled in."""
        if decided is not None and not self.unproxied_rows:
            return decided
        tokens = torch.empty(
            len(self.req_ids), dtype=torch.int64, device=self.unproxied_index.device
        )
        if decided is not None and self.proxied is not None:
            tokens[self.proxied.index] = decided
        return tokens


_NO_PROXIES = BatchPlan([], None, [], torch.empty(0, dtype=torch.int64), None, [])


def make_plan(
    req_ids: Sequence[str],
    assignments: Sequence[Assignment],  # one a row
    pool: ProxyPool,
    device: torch.device,
    *,
    shadows: Sequence[ServedProxy],
) -> BatchPlan:
    """The plan of a batch; nothing here waits for the device."""
    if not shadows and not any(a.proxy for a in assignments):
        return _NO_PROXIES._replace(req_ids=list(req_ids))
    rows = [row for row, a in enumerate(assignments) if a.proxy is not None]
    unproxied = [row for row, a in enumerate(assignments) if a.proxy is None]
    proxied = None
    if rows:
        of_rows = [assignments[row] for row in rows]
        proxied = ProxiedRows(rows, of_rows, pool, device, covers_batch=not unproxied)
    divisors = [a.divisor for a in assignments]
    is_divided = any(divisor != 1 for divisor in divisors)
    return BatchPlan(
        req_ids=list(req_ids),
        proxied=proxied,
        unproxied_rows=unproxied,
        unproxied_index=to_device(unproxied, torch.int64, device),
        divisors=to_device(divisors, torch.float32, device) if is_divided else None,
        shadows=_rows_of_shadows(assignments, shadows, pool, device),
    )


def _rows_of_shadows(
    assignments: Sequence[Assignment],
    shadows: Sequence[ServedProxy],
    pool: ProxyPool,
    device: torch.device,
) -> list[ProxiedRows]:
    """For each shadow the rows that it may score, with the settings that it would decide them with."""
    rows = [row for row, a in enumerate(assignments) if a.shadowed]
    if not rows:
        return []

    def under(shadow: ServedProxy, assignment: Assignment) -> Assignment:
        limit = shadow.config.max_rejections
        return replace(
            assignment, proxy=shadow, strength=1.0, partners=(), max_rejections=limit, traced=False
        )

    return [
        ProxiedRows(
            rows,
            [under(shadow, assignments[row]) for row in rows],
            pool,
            device,
            covers_batch=len(rows) == len(assignments),
        )
        for shadow in shadows
    ]
