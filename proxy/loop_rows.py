"""A plan's rows as the compiled loop wants them: on the host, in arrays and addresses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proxy.acceptance import Decision, most_probable
from proxy.loop import NOWHERE, TILE, decide_rows
from proxy.pool import ProxyPool
from proxy.rows import LOOP_REQUEST, Assignment, Mixture

# Below, the loop multiplies the hidden states itself. MKL's product takes half as long, but all that
# runs after it on the core was measured to be some 4 % slower for milliseconds.
_FEW_PRODUCTS = 2**23
_NOTHING = np.empty((0, 0), np.float32)


class LoopRows:
    """Made when the batch changes; what the loop writes to is kept from step to step."""

    def __init__(
        self,
        rows: Sequence[int],
        assignments: Sequence[Assignment],
        sizes: Sequence[int],  # candidates at most
        pool: ProxyPool,
        mixture: Mixture,
    ) -> None:
        packed = b"".join([assignment.packed for assignment in assignments])
        self._requests = np.frombuffer(bytearray(packed), LOOP_REQUEST)
        self._requests["row"] = rows
        self._requests["proxy"] = [a.proxy.slot for a in assignments if a.proxy is not None]
        self._requests["size"] = sizes
        self._proxies = pool.derived("loop", lambda: _arrays(pool))
        self._mixture = mixture
        state = mixture.state
        self._multiplies = False
        self._state = self._states = self._projected = _NOTHING
        if state is not None and len(rows) * state.numel() <= _FEW_PRODUCTS:
            self._multiplies = True
            self._state = state.numpy()
            tiled = -(-len(rows) // TILE) * TILE
            self._states = np.zeros((tiled, state.shape[1]), np.float32)
            self._projected = np.empty((tiled, state.shape[0]), np.float32)
        most = max(sizes)
        self._values = np.empty((len(rows), most), np.float32)
        self._token_ids = np.empty((len(rows), most), np.int64)
        self._any_top_p = any(assignment.truncation[1] < 1 for assignment in assignments)
        # With threads to share the rows out to, torch is sooner through the vocabulary than one loop.
        self._shares_rows_out = len(rows) > 1 and torch.get_num_threads() > 1
        self._mass = np.zeros(len(rows), np.float32)
        self._decided = np.empty((4, len(rows)), np.int64)
        self._decision = Decision(torch.from_numpy(self._decided))

    def decide(
        self,
        logits: Tensor,  # [R, V]
        hidden: Tensor,  # [A, H], the lm_head's input
        positions: Tensor,  # [R or more] int32
        *,
        tempered: bool,
    ) -> Decision:
        """As `AlignedRows.decide`; `slots` are those of the candidates, the most probable first.

        The next call writes over what this one returns.
        """
        if self._shares_rows_out:
            self._share_out(logits, tempered=tempered)
        hidden = hidden.contiguous()
        states, projected = self._states, self._projected
        projects = self._multiplies and hidden.dtype == torch.bfloat16
        if not projects:
            hidden = hidden.float()
            states, projected = hidden.numpy(), self._mixture.project(hidden).numpy()
        if logits.dtype != torch.bfloat16:
            logits = logits.float()
        decide_rows(
            _address(logits, logits.dtype),
            max(logits.stride(0), logits.shape[1]),  # of a single row it says nothing
            logits.dtype == torch.bfloat16,
            tempered,
            not self._shares_rows_out,
            self._values,
            self._token_ids,
            self._requests,
            self._mass,
            _address(hidden, torch.bfloat16) if projects else NOWHERE,
            self._state,
            states,
            projected,
            *self._proxies,
            _address(positions, torch.int32),
            self._decided,
        )
        return self._decision

    def _share_out(self, logits: Tensor, *, tempered: bool) -> None:
        """What is wanted of the whole vocabulary, by torch and its threads."""
        chosen = logits[self._requests["row"]].float()
        top = most_probable(chosen, self._values.shape[1])
        self._values[:], self._token_ids[:] = (x.numpy() for x in top)
        if self._any_top_p:
            if not tempered:
                chosen /= torch.from_numpy(self._requests["temperature"]).unsqueeze(-1)
            self._mass[:] = chosen.logsumexp(-1).numpy()


def _address(x: Tensor, dtype: torch.dtype) -> int:
    """Where it lies in memory. What numba makes of an array takes some 5 microseconds in a cold step."""
    if x.dtype != dtype or x.stride(-1) != 1:
        raise TypeError(f"{x.dtype} with strides {x.stride()} is no {dtype} in rows.")
    return x.data_ptr()


def _arrays(pool: ProxyPool) -> tuple[Any, ...]:
    """tables [P, V, 2W], product [P, W, W], of_logprob [P, 1, W], score [P, W, 1], bias [P, 1, 1]."""
    assert pool.weights is not None and pool.tables is not None
    weights = pool.weights
    parts = pool.tables, weights.product, weights.logprob, weights.score, weights.bias
    return tuple(part.contiguous().numpy() for part in parts)
