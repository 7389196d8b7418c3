"""Calls that must end alike on all tensor-parallel ranks."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from vllm.distributed.parallel_state import get_tp_group

from proxy.checkpoint import ProxyError

_T = TypeVar("_T")


def raised_by_last_rank(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the worker whose errors, the same on all ranks, only the last rank raises.

    vLLM reads the ranks' replies one after another and stops at the first error. It would take the
    unread replies of the later ranks for the answers to its next call, and so on for ever.
    """

    @wraps(call)
    def wrapped(self: Any, *args: Any) -> Any:
        try:
            return call(self, *args)
        except Exception as error:
            if self.rank == self.parallel_config.world_size - 1:
                raise
            return {"error": str(error)}

    return wrapped


def on_all_ranks(part: Callable[[], tuple[_T, str]]) -> _T:
    """Do one part of a load on every tensor-parallel rank, and wait for the others.

    `part` returns its result, and a string that must be the same on all ranks.

    Raises:
        ProxyError: on every rank, whichever of them failed, and however.
    """
    result, digest, problem = None, "", ""
    try:
        result, digest = part()
    except ProxyError as error:
        problem = str(error)
    except Exception as error:  # a rank that left here would keep the others waiting for ever
        problem = f"{type(error).__name__}: {error}"
    group = get_tp_group()
    ranks = [(problem, digest)] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(ranks, (problem, digest), group=group.cpu_group)
    for rank, (problem, _) in enumerate(ranks):
        if problem:
            where = f" (tensor-parallel rank {rank})" if len(ranks) > 1 else ""
            raise ProxyError(f"{problem}{where}")
    digests = [digest for _, digest in ranks]
    if len({*digests}) > 1:
        raise ProxyError(f"The ranks read different checkpoints: {digests}.")
    return cast(_T, result)


def is_first_rank() -> bool:
    """Whether this is the tensor-parallel rank that counts and reports."""
    return get_tp_group().rank_in_group == 0
