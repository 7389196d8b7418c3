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
from numba import boolean, float32, from_dtype, int32, int64, njit, void
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from proxy.acceptance import GOLDEN_GAMMA, MIX, POSITION_STEP, UNDERFLOW, Decision, most_probable
from proxy.network import MIN_LOGPROB, NORM_FLOOR
from proxy.pool import ProxyPool
from proxy.rows import LOOP_REQUEST, Assignment, Mixture

_MASK = 2**64 - 1
_GAMMA, _STEP = np.uint64(GOLDEN_GAMMA & _MASK), np.uint64(POSITION_STEP & _MASK)
_MIX_1, _MIX_2 = np.uint64(MIX[0] & _MASK), np.uint64(MIX[1] & _MASK)
_UNDERFLOW, _MIN_LOGPROB = np.float32(UNDERFLOW), np.float32(MIN_LOGPROB)
_LOG_2, _SQRT_HALF = math.log(2), math.sqrt(0.5)

_BLOCK, _MANY_BLOCKS = 16, 128  # logits; blocks for each that is sought
_GREATEST_GAP, _BISECTIONS = 2**16, 4
_TILE = 4  # rows
# Below, the loop multiplies the hidden states itself. MKL's product takes half as long, but all that
# runs after it on the core is some 4 % slower for milliseconds: its AVX-512 lowers the clock.
_FEW_PRODUCTS = 2**23


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
        packed = b"".join([assignment.packed for assignment in assignments])
        self._requests = np.frombuffer(bytearray(packed), LOOP_REQUEST)
        self._requests["row"] = rows
        self._requests["proxy"] = [a.proxy.slot for a in assignments if a.proxy is not None]
        self._requests["size"] = sizes
        self._proxies = pool.derived("loop", lambda: _arrays(pool))
        self._mixture = mixture
        state = mixture.state
        self._state = None
        if state is not None and len(rows) * state.numel() <= _FEW_PRODUCTS:
            self._state = state.mT.contiguous().numpy()
            tiled = -(-len(rows) // _TILE) * _TILE
            self._states = np.zeros((tiled, state.shape[0]), np.float32)
            self._projected = np.empty((tiled, state.shape[1]), np.float32)
        most = max(sizes)
        self._values = np.empty((len(rows), most), np.float32)
        self._token_ids = np.empty((len(rows), most), np.int64)
        # With threads to share the rows out to, topk finds the candidates sooner than one loop.
        self._shares_rows_out = len(rows) > 1 and torch.get_num_threads() > 1
        self._no_mass = np.zeros(len(rows), np.float32)
        vocab_size = self._proxies[0].shape[1]
        self._no_top_k = np.full(max(rows) + 1, vocab_size, np.int32)
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
            top = most_probable(logits[self._requests["row"]], values.shape[1])
            values[:], token_ids[:] = (x.numpy() for x in top)
        decided = torch.empty((4, len(values)), dtype=torch.int64)
        _decide_rows(
            logits.numpy(),
            tempered,
            not self._shares_rows_out,
            values,
            token_ids,
            self._requests,
            self._no_mass if top_p is None else self._mass(logits, tempered=tempered),
            *self._project(hidden),
            *self._proxies,
            self._no_top_k if top_k is None else top_k.numpy(),
            self._no_top_p if top_p is None else top_p.numpy(),
            positions.numpy(),
            decided.numpy(),
        )
        return Decision(decided)

    def _project(self, hidden: Tensor) -> tuple[Any, Any]:
        """[A, H] -> the same in float32, and `state_features` of it times its norm, [A, 2W]."""
        if self._state is not None and hidden.dtype == torch.bfloat16 and hidden.is_contiguous():
            bits = hidden.view(torch.int16).numpy()
            _project_bfloat16(bits, self._state, self._states, self._projected)
            return self._states, self._projected
        states = hidden.float()
        return states.contiguous().numpy(), self._mixture.project(states).numpy()

    def _mass(self, logits: Tensor, *, tempered: bool) -> Any:
        """logsumexp of the whole vocabulary: [A]."""
        rows, temperature = self._requests["row"], self._requests["temperature"]
        scaled = logits if len(rows) == len(logits) else logits[rows]
        if not tempered and (temperature != 1).any():
            scaled = scaled / torch.from_numpy(temperature).unsqueeze(-1)
        return scaled.logsumexp(-1).numpy()


def _arrays(pool: ProxyPool) -> tuple[Any, ...]:
    """tables [P, V, 2W], product [P, W, W], of_logprob [P, 1, W], score [P, W, 1], bias [P, 1, 1]."""
    assert pool.weights is not None and pool.tables is not None
    weights = pool.weights
    parts = pool.tables, weights.product, weights.logprob, weights.score, weights.bias
    return tuple(part.contiguous().numpy() for part in parts)


@njit(cache=True, nogil=True)
def _exponential(key: Any, position: Any, counter: Any) -> Any:
    """One number of `acceptance.seeded_noise`."""
    bits = key + position * _STEP + np.uint64(counter) * _GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    bits ^= bits >> np.uint64(31)
    return -math.log((np.float64(bits >> np.uint64(11)) + 0.5) * 2.0**-53)


@njit(
    "void(i2[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])",
    cache=True,
    nogil=True,
    fastmath={"contract", "reassoc"},
)
def _project_bfloat16(bits: Any, state: Any, states: Any, projected: Any) -> None:
    """[A, H] and [2W, H] -> [A, H] and [A, 2W]; both with rows to spare for a last, whole tile."""
    width = bits.shape[1]
    words = np.empty(width, np.uint32)
    for a in range(len(bits)):
        for i in range(width):
            words[i] = np.uint32(np.uint16(bits[a, i])) << np.uint32(16)
        states[a] = words.view(np.float32)
    zero = np.float32(0.0)
    for a in range(0, len(bits), _TILE):
        x0, x1, x2, x3 = states[a], states[a + 1], states[a + 2], states[a + 3]
        for j in range(0, len(state), 2):  # eight sums at once: what registers hold
            y, z = state[j], state[j + 1]
            y0 = y1 = y2 = y3 = z0 = z1 = z2 = z3 = zero
            for i in range(width):
                y0 += x0[i] * y[i]
                y1 += x1[i] * y[i]
                y2 += x2[i] * y[i]
                y3 += x3[i] * y[i]
                z0 += x0[i] * z[i]
                z1 += x1[i] * z[i]
                z2 += x2[i] * z[i]
                z3 += x3[i] * z[i]
            projected[a, j], projected[a, j + 1] = y0, z0
            projected[a + 1, j], projected[a + 1, j + 1] = y1, z1
            projected[a + 2, j], projected[a + 2, j + 1] = y2, z2
            projected[a + 3, j], projected[a + 3, j + 1] = y3, z3


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
def _reach(values: Any, floor: Any) -> Any:
    """How many values are not below the floor."""
    count = 0
    for value in values:
        count += value >= floor
    return count


@njit(cache=True, nogil=True)
def _floor(values: Any, wanted: Any) -> Any:
    """A number that as many values reach as are wanted, and few more; -inf if none was found."""
    high = values[0]
    for value in values:
        high = max(high, value)
    low, gap = high, np.float32(1.0)
    while gap < _GREATEST_GAP and _reach(values, low) < wanted:
        gap *= np.float32(2.0)
        high, low = low, low - gap
    if _reach(values, low) < wanted:
        return np.float32(-np.inf)
    for _ in range(_BISECTIONS):
        middle = (low + high) / np.float32(2.0)
        if _reach(values, middle) < wanted:
            high = middle
        else:
            low = middle
    return low


@njit(cache=True, nogil=True)
def _find_top(logits: Any, values: Any, token_ids: Any, maxima: Any) -> None:
    """The largest logits, largest first, and where they are; [V] -> [K] both.

    What K of the blocks' maxima reach, K logits reach, so all that are sought do, and few others.
    Only blocks that reach it are looked through.
    """
    _block_maxima(logits, maxima)
    values[:] = -np.inf
    token_ids[:] = 0
    sample = maxima
    while len(sample) > _MANY_BLOCKS * len(values):
        fewer = np.empty(len(sample) // _BLOCK, np.float32)
        _block_maxima(sample, fewer)
        sample = fewer
    least = np.float32(-np.inf)
    if len(sample) >= len(values):  # what equals the floor counts
        least = np.nextafter(_floor(sample, len(values)), least)
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


def _fit_erf() -> tuple[float, ...]:
    """Coefficients of P, for erf(x) = x P(x^2 / 8 - 1) within 2e-8 where |x| <= 4."""

    def quotient(t: Any) -> Any:
        x = np.sqrt(8 * (t + 1))
        return np.vectorize(math.erf)(x) / x

    return tuple(Chebyshev.interpolate(quotient, 16).convert(kind=Polynomial).coef.tolist())


_ERF = _fit_erf()


@njit(cache=True, nogil=True, fastmath={"contract", "nnan", "nsz"})
def _gelu(y: Any) -> Any:
    """With a polynomial in the place of math.erf, so that several are done at once."""
    x = min(max(y * _SQRT_HALF, -4.0), 4.0)
    t = x * x / 8.0 - 1.0
    p = _ERF[-1]
    for power in range(len(_ERF) - 2, -1, -1):
        p = p * t + _ERF[power]
    return 0.5 * y * (1.0 + x * p)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
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
        logit += score[j] * _gelu(np.float64(mixed[j]))
    return math.log1p(math.exp(-abs(logit))) + max(-logit, 0.0)


@njit(
    void(
        float32[:, ::1],
        boolean,
        boolean,
        float32[:, ::1],
        int64[:, ::1],
        from_dtype(LOOP_REQUEST)[::1],
        float32[::1],
        float32[:, ::1],
        float32[:, ::1],
        float32[:, :, ::1],
        float32[:, :, ::1],
        float32[:, :, ::1],
        float32[:, :, ::1],
        float32[:, :, ::1],
        int32[::1],
        float32[::1],
        int32[::1],
        int64[:, ::1],
    ),
    cache=True,
    nogil=True,
    fastmath={"contract", "reassoc"},
)
def _decide_rows(
    logits: Any,  # [R, V]
    tempered: Any,  # whether they have been divided by the temperature
    finds_top: Any,  # whether the next two are still to be found
    all_values: Any,  # [A, K] logits, largest first; changed
    all_ids: Any,  # [A, K] their tokens
    requests: Any,  # [A] LOOP_REQUEST
    mass: Any,  # [A] logsumexp of the tempered logits; read where top_p < 1
    states: Any,  # [A, H]
    projected: Any,  # [A, 2W]
    tables: Any,  # [P, V, 2W]
    product: Any,  # [P, W, W]
    of_logprob: Any,  # [P, 1, W]
    score: Any,  # [P, W, 1]
    bias: Any,  # [P, 1, 1]
    top_k: Any,  # [R]
    top_p: Any,  # [R]
    positions: Any,  # [R]
    decided: Any,  # [4, A] out: the columns of Decision
) -> None:
    """Settle A rows."""
    mixed = np.empty(product.shape[1], np.float32)
    features = np.empty(projected.shape[1], np.float32)
    times = np.empty(all_values.shape[1], np.float64)
    maxima = np.empty(logits.shape[1] // _BLOCK, np.float32)
    for a in range(len(requests)):
        request = requests[a]
        row, proxy, greedy = request.row, request.proxy, request.greedy
        values, ids = all_values[a, : request.size], all_ids[a, : request.size]
        if finds_top:
            _find_top(logits[row], values, ids, maxima)
        if not tempered:
            for i in range(len(values)):
                values[i] /= request.temperature
        count = _nucleus_size(values, top_k[row], top_p[row], mass[a])
        total = 0.0
        for i in range(count):
            total += math.exp(values[i] - values[0])
        log_total = values[0] + math.log(total)
        norm = np.float32(0.0)
        for x in states[a]:
            norm += x * x
        features[:] = projected[a] / (math.sqrt(norm) + NORM_FLOOR)
        key, position = np.uint64(request.key), np.uint64(positions[row])
        for i in range(count):  # when each candidate's clock rings
            if greedy:
                times[i] = i
            else:
                race = _exponential(key, position, 2 * ids[i] + 1)
                times[i] = math.log(race) - (values[i] - log_total)
        emitted, proposed = -1, 0
        while emitted < 0 and proposed < min(request.max_rejections, count):
            first = 0
            for i in range(1, count):
                if times[i] < times[first]:
                    first = i
            times[first] = np.inf
            proposed += 1
            cost = 0.0  # a single candidate is accepted: there is no choice
            if count > 1:
                cost = request.strength * _accept_cost(
                    features,
                    tables[proxy, ids[first]],
                    np.float32(values[first] - log_total),
                    product[proxy],
                    of_logprob[proxy, 0],
                    score[proxy, :, 0],
                    bias[proxy, 0, 0],
                    mixed,
                )
            coin = _LOG_2 if greedy else _exponential(key, position, 2 * ids[first] + 2)
            if coin >= cost:
                emitted = first
        slot = max(emitted, 0)
        decided[0, a], decided[1, a], decided[2, a] = slot, ids[slot], proposed
        decided[3, a] = emitted < 0
