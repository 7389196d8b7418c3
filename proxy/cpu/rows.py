"""The rows of a batch as the kernel wants them: on the host, in arrays and addresses.

A = rows that proxies decide, of the batch's R; K = candidates, W = width, P = loaded proxies. A row has
a share for each of its proxies; S = shares of all rows.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from proxy.acceptance import Decision, most_probable
from proxy.cpu.kernel import NOWHERE, REQUEST, TILE, Hidden, Logits, Proxies, Top, decide_rows
from proxy.network import Weights

# Up to so many multiplications the kernel multiplies the hidden states itself. MKL's product takes
# half the time, but was measured to slow everything after it on the core by some 4 % for milliseconds.
_MAX_OWN_PRODUCTS = 2**23
_EMPTY = np.empty((0, 0), np.float32)


class Scorer(Protocol):
    """The first layer of the shares' proxies (`proxy.engine.scoring.ProxyScorer`)."""

    @property
    def state(self) -> Tensor | None:
        """[2W, H], what all shares are multiplied with; None if they have several proxies."""

    def project(self, hidden: Tensor) -> Tensor:
        """[S, H] float32 -> [S, 2W], each share with its own proxy."""


def proxy_arrays(weights: Weights, tables: Tensor) -> Proxies:
    """P proxies and their candidate tables [P, V, 2W], as the kernel reads them."""
    parts = tables, weights.product, weights.logprob, weights.score, weights.bias
    return Proxies(*(part.contiguous().numpy() for part in parts))


class KernelRows:
    """Made when the batch changes; the arrays that the kernel writes to are used at every step."""

    def __init__(
        self,
        requests: bytes,  # S REQUESTs, without their first three fields
        proxies: Proxies,
        scorer: Scorer,
        *,
        rows: Sequence[int],  # A, into the batch
        sizes: Sequence[int],  # A, candidates at most
        counts: Sequence[int] | None,  # A, shares of each row; None = one
        slots: Sequence[int],  # S, of each share's proxy
    ) -> None:
        self._requests = np.frombuffer(bytearray(requests), REQUEST)
        self._requests["row"] = rows if counts is None else np.repeat(rows, counts)
        self._requests["size"] = sizes if counts is None else np.repeat(sizes, counts)
        self._requests["proxy"] = slots
        self._first_shares = self._requests  # [A]
        self._counts: Tensor | None = None
        if counts is not None:
            self._first_shares = self._requests[np.cumsum(counts) - counts]
            self._counts = torch.tensor(counts)
        self._proxies = proxies
        self._scorer = scorer
        self._own_product: tuple[np.ndarray, ...] | None = None  # `Hidden` without the address
        state = scorer.state
        if state is not None and len(rows) * state.numel() <= _MAX_OWN_PRODUCTS:
            tiled = -(-len(rows) // TILE) * TILE
            self._own_product = (
                state.numpy(),
                np.zeros((tiled, state.shape[1]), np.float32),
                np.empty((tiled, state.shape[0]), np.float32),
            )
        self._top = Top(
            # With several threads, torch is faster than one loop over the vocabulary.
            is_given=len(rows) > 1 and torch.get_num_threads() > 1,
            values=np.empty((len(rows), max(sizes)), np.float32),
            token_ids=np.empty((len(rows), max(sizes)), np.int64),
            mass=np.zeros(len(rows), np.float32),
        )
        self._any_top_p = bool((self._requests["top_p"] < 1).any())
        self._columns = np.empty((4, len(rows)), np.int64)
        self._decision = Decision(torch.from_numpy(self._columns))

    def decide(
        self,
        logits: Tensor,  # [R, V]
        hidden: Tensor,  # [A, H], the lm_head's input
        positions: Tensor,  # [R or more] int32, index of the token to be drawn
        *,
        temperature_applied: bool,  # the logits are divided by the temperature of the nucleus
    ) -> Decision:
        """The decision of each row; `slots` index the candidates, the most probable first.

        The next call overwrites what this one returns.
        """
        if self._top.is_given:
            self.find_top(logits, temperature_applied=temperature_applied)
        hidden = hidden.contiguous()
        if self._counts is not None:
            hidden = hidden.repeat_interleave(self._counts, 0)
        if self._own_product is not None and hidden.dtype == torch.bfloat16:
            inputs = Hidden(_address(hidden, torch.bfloat16), *self._own_product)
        else:
            hidden = hidden.float()
            inputs = Hidden(NOWHERE, _EMPTY, hidden.numpy(), self._scorer.project(hidden).numpy())
        if logits.dtype != torch.bfloat16:
            logits = logits.float()
        decide_rows(
            Logits(
                _address(logits, logits.dtype),
                max(logits.stride(0), logits.shape[1]),  # a single row may have any stride
                logits.dtype == torch.bfloat16,
                temperature_applied,
            ),
            self._top,
            inputs,
            self._proxies,
            self._requests,
            _address(positions, torch.int32),
            self._columns,
        )
        return self._decision

    def find_top(self, logits: Tensor, *, temperature_applied: bool) -> None:
        """Fill the kernel's `Top`, with torch's threads."""
        own = logits[self._first_shares["row"]].float()
        values, token_ids = most_probable(own, self._top.values.shape[1])
        self._top.values[:], self._top.token_ids[:] = values.numpy(), token_ids.numpy()
        if self._any_top_p:
            if not temperature_applied:
                own /= torch.from_numpy(self._first_shares["temperature"]).unsqueeze(-1)
            self._top.mass[:] = own.logsumexp(-1).numpy()


def _address(x: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor is in memory. Unboxing an array costs numba some 5 microseconds in a cold step."""
    if x.dtype != dtype or x.stride(-1) != 1:
        raise TypeError(f"{x.dtype} with strides {x.stride()} is no {dtype} in rows.")
    return x.data_ptr()
