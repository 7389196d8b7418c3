"""How the rows of one batch are sampled: made on the host when the batch changes, used every step.

R = logits rows, P = rows that no proxy decides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.pool import ProxyPool
from proxy.rows import AlignedRows, Assignment, to_device


class Plan(NamedTuple):
    """How the rows of a batch are sampled; a row is a request, in the order of `req_ids`."""

    req_ids: list[str]
    aligned: AlignedRows | None  # None, and no row shadowed: all is vLLM's
    plain_rows: list[int]
    plain_index: Tensor  # [P] int64, `plain_rows` on the device
    shadowed: Tensor | None  # [R] bool, rows that shadow proxies may score; None = no row
    greedy: Tensor | None  # [R] bool, for the shadows; None = no row


_NOTHING_TO_DO = Plan([], None, [], torch.empty(0, dtype=torch.int64), None, None)


def make_plan(
    req_ids: Sequence[str],
    assignments: Sequence[Assignment],  # one a row
    pool: ProxyPool,
    device: torch.device,
    *,
    has_shadows: bool,
) -> Plan:
    """Sort the rows of a batch; nothing here waits for the device."""
    if not has_shadows and not any(a.proxy for a in assignments):
        return _NOTHING_TO_DO._replace(req_ids=list(req_ids))
    rows = [row for row, a in enumerate(assignments) if a.proxy is not None]
    plain = [row for row, a in enumerate(assignments) if a.proxy is None]
    aligned = None
    if rows:
        chosen = [assignments[row] for row in rows]
        aligned = AlignedRows(rows, chosen, pool, device, covers_batch=not plain)
    shadowed = [a.shadowed for a in assignments] if has_shadows else []
    greedy = [a.is_greedy for a in assignments] if has_shadows else []
    return Plan(
        req_ids=list(req_ids),
        aligned=aligned,
        plain_rows=plain,
        plain_index=to_device(plain, torch.int64, device),
        shadowed=to_device(shadowed, torch.bool, device) if any(shadowed) else None,
        greedy=to_device(greedy, torch.bool, device) if any(greedy) else None,
    )
