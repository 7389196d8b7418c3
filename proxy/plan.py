"""How the rows of one batch are sampled: made on the host when the batch changes, used every step.

R = logits rows, P = rows that no proxy decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.pool import ProxyPool, ServedProxy
from proxy.rows import AlignedRows, Assignment, to_device


class Plan(NamedTuple):
    """How the rows of a batch are sampled; a row is a request, in the order of `req_ids`."""

    req_ids: list[str]
    aligned: AlignedRows | None  # None, and no shadows: all is vLLM's
    plain_rows: list[int]
    plain_index: Tensor  # [P] int64, `plain_rows` on the device
    divisors: Tensor | None  # [R] float32, what logits are divided by; None = 1 everywhere
    shadows: list[AlignedRows]  # by shadow proxy: the rows that it scores, as it would decide them


_NOTHING_TO_DO = Plan([], None, [], torch.empty(0, dtype=torch.int64), None, [])


def make_plan(
    req_ids: Sequence[str],
    assignments: Sequence[Assignment],  # one a row
    pool: ProxyPool,
    device: torch.device,
    *,
    shadows: Sequence[ServedProxy],
) -> Plan:
    """Sort the rows of a batch; nothing here waits for the device."""
    if not shadows and not any(a.proxy for a in assignments):
        return _NOTHING_TO_DO._replace(req_ids=list(req_ids))
    rows = [row for row, a in enumerate(assignments) if a.proxy is not None]
    plain = [row for row, a in enumerate(assignments) if a.proxy is None]
    aligned = None
    if rows:
        chosen = [assignments[row] for row in rows]
        aligned = AlignedRows(rows, chosen, pool, device, covers_batch=not plain)
    divisors = [a.divisor for a in assignments]
    is_divided = any(divisor != 1 for divisor in divisors)
    return Plan(
        req_ids=list(req_ids),
        aligned=aligned,
        plain_rows=plain,
        plain_index=to_device(plain, torch.int64, device),
        divisors=to_device(divisors, torch.float32, device) if is_divided else None,
        shadows=_rows_of_shadows(assignments, shadows, pool, device),
    )


def _rows_of_shadows(
    assignments: Sequence[Assignment],
    shadows: Sequence[ServedProxy],
    pool: ProxyPool,
    device: torch.device,
) -> list[AlignedRows]:
    rows = [row for row, a in enumerate(assignments) if a.shadowed]
    if not rows:
        return []

    def followed(assignment: Assignment, shadow: ServedProxy) -> Assignment:
        limit = shadow.config.max_rejections
        return replace(assignment, proxy=shadow, strength=1.0, max_rejections=limit, traced=False)

    return [
        AlignedRows(
            rows,
            [followed(assignments[row], shadow) for row in rows],
            pool,
            device,
            covers_batch=len(rows) == len(assignments),
        )
        for shadow in shadows
    ]
