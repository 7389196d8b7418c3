"""The law on a CPU: the loop that the paper describes, compiled, one row after another.

`acceptance` settles all positions at once with some forty tensor operations, which suits an
accelerator. On a CPU their overhead is most of what a small batch costs, so here the same law is
written out: propose, ask the proxy, throw away, propose again. The network is asked about the
candidates that are proposed and about no others. Given the same noise both decide alike, up to
rounding; `tests/proxy/test_loop.py` holds them together.

numba compiles this file at its first import on a machine (seconds) and keeps the result on disk.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from numba import njit
from torch import Tensor

from proxy.acceptance import GOLDEN_GAMMA, MIX, POSITION_STEP, UNDERFLOW, Decision, most_probable
from proxy.network import MIN_LOGPROB, NORM_FLOOR
from proxy.pool import ProxyPool
from proxy.rows import Assignment, Mixture

_MASK = 2**64 - 1
_GAMMA, _STEP = np.uint64(GOLDEN_GAMMA & _MASK), np.uint64(POSITION_STEP & _MASK)
_MIX_1, _MIX_2 = np.uint64(MIX[0] & _MASK), np.uint64(MIX[1] & _MASK)
_UNDERFLOW, _MIN_LOGPROB = np.float32(UNDERFLOW), np.float32(MIN_LOGPROB)
_LOG_2, _SQRT_HALF = math.log(2), math.sqrt(0.5)

_BLOCK = 16  # logits
_FEW_PRODUCTS = 2**17  # beyond, a matrix product is worth the calls it takes
_DECIDE = (
    "void(f4[:,::1], b1, f4[:,::1], i8[:,::1], i8[::1], f4[::1], f4[:,::1], f4[:,::1], i8[::1],"
    " f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i8[::1],"
    " f4[::1], i4[::1], f4[::1], f4[::1], i8[::1], b1[::1], i8[::1], i4[::1],"
    " i8[::1], i8[::1], i8[::1], b1[::1])"
)


def _hide_from_vllm() -> None:
    """Let vLLM start another engine in this process.

    To register its CPU kernels it asks every object of every module for `__dict__`. llvmlite's
    handle of the LLVM library takes that, like any name, for a function to look up.
    """
    handle = type(ffi.lib)
    look_up = handle.__getattr__

    def getattribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    handle.__getattr__ = getattribute


_hide_from_vllm()


class LoopRows:
    """The rows of a plan, as the loop wants them: on the host, in arrays."""

    def __init__(
        self,
        rows: Sequence[int],
        assignments: Sequence[Assignment],
        sizes: Sequence[int],  # candidates at most
        pool: ProxyPool,
        mixture: Mixture,
    ) -> None:
        assert pool.weights is not None and pool.tables is not None
        weights = pool.weights
        self._rows = np.array(rows)
        self._sizes = np.array(sizes)
        slots = [a.proxy.slot for a in assignments if a.proxy is not None]
        pooled = (pool.tables, weights.product, weights.logprob, weights.score, weights.bias)
        self._proxies = (np.array(slots), *(part.contiguous().numpy() for part in pooled))
        self._temperature = np.array([a.divisor for a in assignments], np.float32)
        self._settings = (
            np.array([a.strength for a in assignments], np.float32),
            np.array([a.max_rejections for a in assignments]),
            np.array([a.is_greedy for a in assignments]),
            np.array([a.key for a in assignments]),
        )
        self._mixture = mixture
        state = mixture.state
        self._state = None
        if state is not None and len(rows) * state.numel() <= _FEW_PRODUCTS:
            self._state = state.contiguous().numpy()
            self._states = np.empty((len(rows), state.shape[0]), np.float32)
            self._projected = np.empty((len(rows), state.shape[1]), np.float32)
        most = max(sizes)
        self._values = np.empty((len(rows), most), np.float32)
        self._token_ids = np.empty((len(rows), most), np.int64)
        # With threads to share the rows out to, topk finds the candidates sooner than one loop.
        self._shares_rows_out = len(rows) > 1 and torch.get_num_threads() > 1
        self._no_temperature = np.ones(len(rows), np.float32)
        self._no_mass = np.zeros(len(rows), np.float32)
        self._no_top_k = np.full(max(rows) + 1, pool.tables.shape[1], np.int32)
        self._no_top_p = np.ones(max(rows) + 1, np.float32)

    def decide(
        self,
        logits: Tensor,  # [R, V]
        hidden: Tensor,  # [A, H], the lm_head's input
        positions: Tensor,  # [R] int32
        top_k: Tensor | None,  # [R] int32
        top_p: Tensor | None,  # [R] float32
        *,
        tempered: bool,
    ) -> Decision:
        """As `AlignedRows.decide`; `slots` are those of the candidates, the most probable first."""
        if not logits.is_contiguous() or logits.dtype != torch.float32:
            logits = logits.float().contiguous()
        values, token_ids = self._values, self._token_ids
        if self._shares_rows_out:
            top = most_probable(logits[self._rows], values.shape[1])
            values[:], token_ids[:] = (x.numpy() for x in top)
        temperature = self._no_temperature if tempered else self._temperature
        count = len(values)
        slots, emitted, num_proposed = (np.empty(count, np.int64) for _ in range(3))
        forced = np.empty(count, np.bool_)
        _decide_rows(
            logits.numpy(),
            not self._shares_rows_out,
            values,
            token_ids,
            self._rows,
            self._no_mass if top_p is None else self._mass(logits, temperature),
            *self._project(hidden),
            *self._proxies,
            self._sizes,
            temperature,
            self._no_top_k if top_k is None else top_k.numpy(),
            self._no_top_p if top_p is None else top_p.numpy(),
            *self._settings,
            positions.numpy(),
            slots,
            emitted,
            num_proposed,
            forced,
        )
        tensor = torch.from_numpy
        return Decision(tensor(slots), tensor(emitted), tensor(num_proposed), tensor(forced))

    def _project(self, hidden: Tensor) -> tuple[Any, Any]:
        """[A, H] -> the same in float32, and `state_features` of it times its norm, [A, 2W]."""
        if self._state is not None and hidden.dtype == torch.bfloat16 and hidden.is_contiguous():
            bits = hidden.view(torch.int16).numpy()
            _project_bfloat16(bits, self._state, self._states, self._projected)
            return self._states, self._projected
        states = hidden.float()
        return states.contiguous().numpy(), self._mixture.project(states).numpy()

    def _mass(self, logits: Tensor, temperature: Any) -> Any:
        """logsumexp of the whole vocabulary: [A]."""
        scaled = logits if len(self._rows) == len(logits) else logits[self._rows]
        if (temperature != 1).any():
            scaled = scaled / torch.from_numpy(temperature).unsqueeze(-1)
        return scaled.logsumexp(-1).numpy()


@njit(cache=True, nogil=True)
def _exponential(key: Any, position: Any, counter: Any) -> Any:
    """One number of `acceptance.seeded_noise`."""
    bits = key + position * _STEP + np.uint64(counter) * _GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    bits ^= bits >> np.uint64(31)
    return -math.log((np.float64(bits >> np.uint64(11)) + 0.5) * 2.0**-53)


@njit("void(i2[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])", cache=True, nogil=True)
def _project_bfloat16(bits: Any, state: Any, states: Any, projected: Any) -> None:
    """One call in the place of five for a few rows: [A, H] and [H, 2W] -> [A, H] and [A, 2W]."""
    words = np.empty(bits.shape[1], np.uint32)
    for a in range(len(bits)):
        for i in range(len(words)):
            words[i] = np.uint32(np.uint16(bits[a, i])) << np.uint32(16)
        states[a] = words.view(np.float32)
        projected[a] = 0.0
        for i in range(len(words)):
            x = states[a, i]
            for j in range(projected.shape[1]):
                projected[a, j] += x * state[i, j]


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _block_maxima(logits: Any, maxima: Any) -> None:
    """The largest of every `_BLOCK` logits; a last, shorter block is left out."""
    for block in range(len(maxima)):
        top = logits[block * _BLOCK]
        for token in range(block * _BLOCK + 1, (block + 1) * _BLOCK):
            top = max(top, logits[token])
        maxima[block] = top


@njit(cache=True, nogil=True)
def _keep_largest(
    logits: Any, start: Any, stop: Any, least: Any, values: Any, token_ids: Any
) -> Any:
    """Sort those of `logits[start:stop]` above `least` into the K largest; returns the new `least`."""
    last = len(values) - 1
    for token in range(start, stop):
        value = logits[token]
        if value > least:
            slot = last
            while slot > 0 and values[slot - 1] < value:
                values[slot] = values[slot - 1]
                token_ids[slot] = token_ids[slot - 1]
                slot -= 1
            values[slot] = value
            token_ids[slot] = token
            least = max(least, values[last])
    return least


@njit(cache=True, nogil=True)
def _find_top(logits: Any, values: Any, token_ids: Any, maxima: Any) -> None:
    """The largest logits, largest first, and where they are; [V] -> [K] both.

    The K-th largest of the blocks' maxima is a floor: K logits reach it, so all that are sought do,
    and few others. Only blocks that reach it are looked through.
    """
    _block_maxima(logits, maxima)
    values[:] = -np.inf
    floor = _keep_largest(maxima, 0, len(maxima), np.float32(-np.inf), values, token_ids)
    values[:] = -np.inf
    token_ids[:] = 0
    least = np.nextafter(floor, np.float32(-np.inf))  # what equals the floor counts
    for block in range(len(maxima)):
        if maxima[block] > least:
            start = block * _BLOCK
            least = _keep_largest(logits, start, start + _BLOCK, least, values, token_ids)
    _keep_largest(logits, len(maxima) * _BLOCK, len(logits), least, values, token_ids)


@njit(cache=True, nogil=True)
def _nucleus_size(values: Any, top_k: Any, top_p: Any, mass: Any) -> Any:
    """How many of the values, largest first, `acceptance.nucleus` would leave."""
    count = 0
    while count < len(values) and values[count] - values[0] > _UNDERFLOW:
        count += 1
    is_top_k = top_k <= len(values)
    if is_top_k:
        while count > 1 and values[count - 1] < values[top_k - 1]:
            count -= 1
    if top_p < 1:
        total = math.exp(mass - values[0])
        if is_top_k:
            total = 0.0
            for slot in range(count):
                total += math.exp(values[slot] - values[0])
        before = 0.0
        for slot in range(count):
            if slot > 0 and before >= top_p * total:
                return slot
            before += math.exp(values[slot] - values[0])
    return max(count, 1)


@njit(cache=True, nogil=True, fastmath={"contract"})
def _accept_cost(
    features: Any,  # [2W] u and A u
    candidate: Any,  # [2W] c and A c + b
    logprob: Any,
    product: Any,  # [W, W]
    of_logprob: Any,  # [W]
    score: Any,  # [W]
    bias: Any,
    mixed: Any,  # [W], scratch
) -> Any:
    """-log of the probability that the proxy accepts: softplus(-accept logit)."""
    width = len(mixed)
    logprob = max(logprob, _MIN_LOGPROB)
    for j in range(width):
        mixed[j] = candidate[width + j] + features[width + j] + logprob * of_logprob[j]
    for i in range(width):
        x = features[i] * candidate[i]
        for j in range(width):
            mixed[j] += x * product[i, j]
    logit = np.float64(bias)
    for j in range(width):
        y = np.float64(mixed[j])
        logit += score[j] * (y * 0.5 * (1.0 + math.erf(y * _SQRT_HALF)))
    return math.log1p(math.exp(-abs(logit))) + max(-logit, 0.0)


@njit(_DECIDE, cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _decide_rows(
    logits: Any,  # [R, V]
    finds_top: Any,  # whether the next two are still to be found
    all_values: Any,  # [A, K] logits, largest first; changed
    all_ids: Any,  # [A, K] their tokens
    rows: Any,  # [A], which of the R rows they are
    mass: Any,  # [A] logsumexp of the tempered logits; read where top_p < 1
    states: Any,  # [A, H]
    projected: Any,  # [A, 2W]
    slots: Any,  # [A], which proxy of the pool
    tables: Any,  # [P, V, 2W]
    product: Any,  # [P, W, W]
    of_logprob: Any,  # [P, 1, W]
    score: Any,  # [P, W, 1]
    bias: Any,  # [P, 1, 1]
    sizes: Any,  # [A]
    temperature: Any,  # [A] > 0
    top_k: Any,  # [R]
    top_p: Any,  # [R]
    strength: Any,  # [A]
    max_rejections: Any,  # [A]
    greedy: Any,  # [A]
    keys: Any,  # [A]
    positions: Any,  # [R]
    emitted_slots: Any,  # [A] out
    emitted_ids: Any,  # [A] out
    num_proposed: Any,  # [A] out
    forced: Any,  # [A] out
) -> None:
    """Settle A rows."""
    mixed = np.empty(product.shape[1], np.float32)
    features = np.empty(projected.shape[1], np.float32)
    times = np.empty(all_values.shape[1], np.float64)
    maxima = np.empty(logits.shape[1] // _BLOCK, np.float32)
    for a in range(len(rows)):
        row, proxy = rows[a], slots[a]
        values, ids = all_values[a, : sizes[a]], all_ids[a, : sizes[a]]
        if finds_top:
            _find_top(logits[row], values, ids, maxima)
        for i in range(len(values)):
            values[i] /= temperature[a]
        count = _nucleus_size(values, top_k[row], top_p[row], mass[a])
        total = 0.0
        for i in range(count):
            total += math.exp(values[i] - values[0])
        log_total = values[0] + math.log(total)
        norm = np.float32(0.0)
        for x in states[a]:
            norm += x * x
        features[:] = projected[a] / (math.sqrt(norm) + NORM_FLOOR)
        key, position = np.uint64(keys[a]), np.uint64(positions[row])
        for i in range(count):  # when each candidate's clock rings
            if greedy[a]:
                times[i] = i
            else:
                race = _exponential(key, position, 2 * ids[i] + 1)
                times[i] = math.log(race) - (values[i] - log_total)
        emitted, proposed = -1, 0
        while emitted < 0 and proposed < min(max_rejections[a], count):
            first = 0
            for i in range(1, count):
                if times[i] < times[first]:
                    first = i
            times[first] = np.inf
            proposed += 1
            cost = 0.0  # a single candidate is accepted: there is no choice
            if count > 1:
                cost = strength[a] * _accept_cost(
                    features,
                    tables[proxy, ids[first]],
                    np.float32(values[first] - log_total),
                    product[proxy],
                    of_logprob[proxy, 0],
                    score[proxy, :, 0],
                    bias[proxy, 0, 0],
                    mixed,
                )
            coin = _LOG_2 if greedy[a] else _exponential(key, position, 2 * ids[first] + 2)
            if coin >= cost:
                emitted = first
        forced[a] = emitted < 0
        emitted_slots[a] = max(emitted, 0)
        emitted_ids[a] = ids[max(emitted, 0)]
        num_proposed[a] = proposed
