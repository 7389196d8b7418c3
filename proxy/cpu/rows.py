"""The rows of a batch as the kernel wants them: on the host, in arrays and addresses.

A = rows that proxies decide, of the batch's R; K = candidates, W = width, P = loaded proxies.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from proxy.acceptance import Decision, most_probable
from proxy.cpu.kernel import NOWHERE, REQUEST, TILE, Proxies, decide_rows
from proxy.network import Weights

# Up to so many multiplications the kernel multiplies the hidden states itself. MKL's product takes
# half the time, but was measured to slow everything after it on the core by some 4 % for milliseconds.
_MAX_OWN_PRODUCTS = 2**23
_EMPTY = np.empty((0, 0), np.float32)


class Scorer(Protocol):
    """The first layer of the rows' proxies (`proxy.engine.scoring.ProxyScorer`)."""

    @property
    def state(self) -> Tensor | None:
        """[2W, H], what all rows are multiplied with; None if they have several proxies."""

    def project(self, hidden: Tensor) -> Tensor:
        """[A, H] float32 -> [A, 2W], each row with its own proxy."""


def proxy_arrays(weights: Weights, tables: Tensor) -> Proxies:
    """P proxies and their candidate tables [P, V, 2W], as the kernel reads them."""
    parts = tables, weights.product, weights.logprob, weights.score, weights.bias
    return Proxies(*(part.contiguous().numpy() for part in parts))


class KernelRows:
    """Made when the batch changes; the arrays that the kernel writes to are used at every step."""

    def __init__(
        self,
        requests: bytes,  # A REQUESTs, without their first three fields
        proxies: Proxies,
        scorer: Scorer,
        *,
        rows: Sequence[int],  # A, into the batch
        slots: Sequence[int],  # A, of each row's proxy
        sizes: Sequence[int],  # A, candidates at most
    ) -> None:
        self._requests = np.frombuffer(bytearray(requests), REQUEST)
        self._requests["row"] = rows
        self._requests["proxy"] = slots
        self._requests["size"] = sizes
        self._proxies = proxies
        self._scorer = scorer
        state = scorer.state
        self._multiplies = False
        self._state = self._states = self._projected = _EMPTY
        if state is not None and len(rows) * state.numel() <= _MAX_OWN_PRODUCTS:
            self._multiplies = True
            self._state = state.numpy()
            tiled = -(-len(rows) // TILE) * TILE
            self._states = np.zeros((tiled, state.shape[1]), np.float32)
            self._projected = np.empty((tiled, state.shape[0]), np.float32)
        self._values = np.empty((len(rows), max(sizes)), np.float32)
        self._token_ids = np.empty((len(rows), max(sizes)), np.int64)
        self._mass = np.zeros(len(rows), np.float32)
        self._any_top_p = bool((self._requests["top_p"] < 1).any())
        # With several threads, torch is faster than one loop over the vocabulary.
        self._uses_threads = len(rows) > 1 and torch.get_num_threads() > 1
        self._decided = np.empty((4, len(rows)), np.int64)
        self._decision = Decision(torch.from_numpy(self._decided))

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
        if self._uses_threads:
            self.find_top(logits, temperature_applied=temperature_applied)
        hidden = hidden.contiguous()
        states, projected = self._states, self._projected
        multiplies = self._multiplies and hidden.dtype == torch.bfloat16
        if not multiplies:
            hidden = hidden.float()
            states, projected = hidden.numpy(), self._scorer.project(hidden).numpy()
        if logits.dtype != torch.bfloat16:
            logits = logits.float()
        decide_rows(
            _address(logits, logits.dtype),
            max(logits.stride(0), logits.shape[1]),  # a single row may have any stride
            logits.dtype == torch.bfloat16,
            temperature_applied,
            not self._uses_threads,
            self._values,
            self._token_ids,
            self._requests,
            self._mass,
            _address(hidden, torch.bfloat16) if multiplies else NOWHERE,
            self._state,
            states,
            projected,
            *self._proxies,
            _address(positions, torch.int32),
            self._decided,
        )
        return self._decision

    def find_top(self, logits: Tensor, *, temperature_applied: bool) -> None:
        """The kernel's `Top`, with torch's threads."""
        own = logits[self._requests["row"]].float()
        top = most_probable(own, self._values.shape[1])
        self._values[:], self._token_ids[:] = (x.numpy() for x in top)
        if self._any_top_p:
            if not temperature_applied:
                own /= torch.from_numpy(self._requests["temperature"]).unsqueeze(-1)
            self._mass[:] = own.logsumexp(-1).numpy()


def _address(x: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor is in memory. Unboxing an array costs numba some 5 microseconds in a cold step."""
    if x.dtype != dtype or x.stride(-1) != 1:
        raise TypeError(f"{x.dtype} with strides {x.stride()} is no {dtype} in rows.")
    return x.data_ptr()
