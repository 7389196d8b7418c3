"""Accept/reject sampling on a CPU: the paper's loop, compiled, one row after another.

`proxy.acceptance` is the definition. It decides all rows at once with some forty tensor operations,
which suits an accelerator. On a CPU the overhead of the operations is most of what a small batch
costs, so here the same rule is a loop over the rows, and the network scores the proposed candidates
only. Given the same noise both decide alike, up to rounding (`tests/proxy/test_kernel.py`).

`decide_rows`, for each of A rows, which P proxies decide together (S = sum of P over the rows):

1. The size largest of V logits, largest first; the first token first among equal ones.
2. The nucleus: divide by the temperature; drop what underflows, what is below the top_k-th value,
   and what has a mass of top_p or more before it. Keep at least one candidate.
3. The arrival time of each candidate in an exponential race of rates p^sharpness. Its noise is a hash
   of the request's key, the position and the token, as in `noise.seeded_noise`.
4. Propose candidates in the order of arrival. Accept one with probability a^strength, where a is the
   network's (`proxy.network`, with the candidate's half of the first layer from a table), or with the
   product over the row's proxies. Stop at the first accepted one; after max_rejections take the first
   candidate, which is `forced`. A row with one candidate accepts it. A greedy row scores the
   max_rejections most probable candidates and takes that of largest log p + strength log a.

numba compiles this file at its first import on a machine, which takes seconds, and caches the result
on disk until this file changes. It would not see a change of imported constants: everything compiled
is defined here, and a test holds the constants equal to those of `noise`, `acceptance` and `network`.
That is why the file is longer than 300 lines.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite.binding import ffi
from numba import boolean, carray, float32, from_dtype, int64, njit, types, void
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

# As in proxy.noise and proxy.acceptance.
GOLDEN_GAMMA, POSITION_STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
UNDERFLOW = np.float32(math.log(np.finfo(np.float32).tiny))
# As in proxy.network.
MIN_LOGPROB, NORM_FLOOR = np.float32(-20.0), 1e-6

_SQRT_HALF = math.sqrt(0.5)
_BLOCK, _MANY_BLOCKS = 16, 128  # logits; blocks for each logit that is wanted
_LARGEST_GAP, _BISECTIONS = 2**16, 4
TILE = 4  # rows multiplied at once
NOWHERE = 0
"""Address of nothing."""

REQUEST = np.dtype(
    [
        ("row", np.int64),  # in the logits
        ("proxy", np.int64),  # its index in `Proxies`
        ("size", np.int64),  # candidates at most
        ("num_shares", np.int64),  # proxies that decide the row together
        ("max_rejections", np.int64),
        ("key", np.int64),  # of its noise
        ("top_k", np.int64),  # 0 = off
        ("top_p", np.float32),  # 1 = off
        ("temperature", np.float32),  # of the nucleus
        ("sharpness", np.float32),
        ("strength", np.float32),
        ("greedy", np.bool_),
    ],
    align=True,
)
"""One row's request: so many times as the row has proxies, with the proxy and the strength of each."""


class Logits(NamedTuple):
    """The logits of the batch, R rows of which A are decided."""

    address: int  # of [R, V], float32 or bfloat16
    stride: int  # numbers from row to row; the head may have padded the vocabulary
    is_bfloat16: bool
    temperature_applied: bool  # they are divided by the requests' temperatures


class Top(NamedTuple):
    """The largest logits of each row."""

    is_given: bool  # True: read from here, False: found by the kernel
    values: Any  # [A, K] float32, largest first; changed
    token_ids: Any  # [A, K] int64
    mass: Any  # [A] float32, logsumexp of the row's logits divided by the temperature, if given


class Hidden(NamedTuple):
    """The lm_head's input, and its product with the proxies' first layer."""

    address: (
        int  # of [S, H] bfloat16, to be multiplied here; NOWHERE: `rows`, `projected` are given
    )
    state: Any  # [2W, H] float32, what it is multiplied with
    rows: Any  # [S, H] float32, with rows to spare for whole tiles if multiplied here
    projected: Any  # [S, 2W] float32, likewise


class Proxies(NamedTuple):
    """Tables and weights of P proxies, float32."""

    tables: Any  # [P, V, 2W]
    product: Any  # [P, W, W]
    logprob: Any  # [P, 1, W]
    score: Any  # [P, W, 1]
    bias: Any  # [P, 1, 1]


class _Network(NamedTuple):
    """The weights of one proxy."""

    product: Any  # [W, W]
    logprob: Any  # [W]
    score: Any  # [W]
    bias: Any


def _hide_from_vllm() -> None:
    """Let vLLM start another engine in this process.

    To register its CPU kernels, vLLM asks every object of every module for `__dict__`. llvmlite's
    handle of the LLVM library takes any name for a function to look up, and fails.
    """
    handle = type(ffi.lib)
    look_up = handle.__getattr__

    def getattribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    handle.__getattr__ = getattribute


_hide_from_vllm()


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(cache=True, nogil=True)
def _exponential(key: Any, position: Any, counter: Any) -> Any:
    """One number of `noise.seeded_noise`."""
    bits = key + position * POSITION_STEP + np.uint64(counter) * GOLDEN_GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * MIX_2
    bits ^= bits >> np.uint64(31)
    return -math.log((np.float64(bits >> np.uint64(11)) + 0.5) * 2.0**-53)


@njit(cache=True, nogil=True)
def _widen(halves: Any, words: Any, floats: Any) -> None:
    """The bits of bfloat16, which are the upper half of a float32 -> float32. `words` is scratch."""
    for i in range(len(halves)):
        words[i] = np.uint32(np.uint16(halves[i])) << np.uint32(16)
    floats[:] = words.view(np.float32)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _project(halves: Any, state: Any, states: Any, projected: Any) -> None:
    """The bits of bfloat16 [S, H], times [2W, H] -> float32 [S, H], [S, 2W], padded to whole tiles."""
    width = halves.shape[1]
    words = np.empty(width, np.uint32)
    for a in range(len(halves)):
        _widen(halves[a], words, states[a])
    zero = np.float32(0.0)
    for a in range(0, len(halves), TILE):
        x0, x1, x2, x3 = states[a], states[a + 1], states[a + 2], states[a + 3]
        for j in range(0, len(state), 2):  # eight sums at once, as many as the registers hold
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
    """The largest of every `_BLOCK` logits, without a last, shorter block."""
    for block in range(len(maxima)):
        top = logits[block * _BLOCK]
        for token in range(block * _BLOCK + 1, (block + 1) * _BLOCK):
            top = max(top, logits[token])
        maxima[block] = top


@njit(cache=True, nogil=True)
def _keep_largest(
    logits: Any, start: Any, stop: Any, least: Any, values: Any, token_ids: Any
) -> Any:
    """Insert those of `logits[start:stop]` above `least` into the K largest; returns the new `least`."""
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
    """The number of values that are not below the floor."""
    count = 0
    for value in values:
        count += value >= floor
    return count


@njit(cache=True, nogil=True)
def _floor(values: Any, wanted: Any) -> Any:
    """A floor that at least `wanted` values reach, and few more; -inf if none was found."""
    high = values[0]
    for value in values:
        high = max(high, value)
    low, gap = high, np.float32(1.0)
    while gap < _LARGEST_GAP and _reach(values, low) < wanted:
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
    """The K largest logits, largest first, and their tokens: [V] -> [K] both.

    A floor that K block maxima reach is reached by K logits, so it is not above any of the K largest.
    Only the blocks whose maximum reaches it are searched.
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
    if len(sample) >= len(values):  # logits equal to the floor count
        least = np.nextafter(_floor(sample, len(values)), least)
    for block in range(len(maxima)):
        if maxima[block] > least:
            start = block * _BLOCK
            least = _keep_largest(logits, start, start + _BLOCK, least, values, token_ids)
    _keep_largest(logits, len(maxima) * _BLOCK, len(logits), least, values, token_ids)


@njit(cache=True, nogil=True)
def _nucleus_size(values: Any, top_k: Any, top_p: Any, total: Any) -> Any:
    """The number of values, largest first, that `acceptance.nucleus` keeps.

    `total` is the probability of the whole vocabulary, divided by that of the first value.
    """
    count = 0
    while count < len(values) and values[count] - values[0] > UNDERFLOW:
        count += 1
    is_top_k = top_k <= len(values)
    if is_top_k:
        while count > 1 and values[count - 1] < values[top_k - 1]:
            count -= 1
    if top_p < 1:
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


def _fit_exp2() -> tuple[Any, ...]:
    """Coefficients of a polynomial that is 2^x within 2e-8 where |x| <= 1/2."""
    fit = Chebyshev.interpolate(np.exp2, 7, domain=(-0.5, 0.5))
    return tuple(np.float32(c) for c in fit.convert(kind=Polynomial).coef)


_EXP2, _LOG2_E = _fit_exp2(), np.float32(math.log2(math.e))


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nnan", "nsz"})
def _total(logits: Any, top: Any, temperature: Any, words: Any, fractions: Any) -> Any:
    """The sum of exp((logit - top) / temperature); a polynomial for 2^x lets LLVM vectorise it."""
    scale = _LOG2_E / temperature
    for i in range(len(logits)):
        x = max((logits[i] - top) * scale, np.float32(-126.0))
        whole = np.int32(x - np.float32(0.5))
        x -= np.float32(whole)
        y = _EXP2[-1]
        for power in range(len(_EXP2) - 2, -1, -1):
            y = y * x + _EXP2[power]
        fractions[i] = y
        words[i] = np.uint32(whole + np.int32(127)) << np.uint32(23)  # 2^whole, as float32
    powers = words.view(np.float32)
    total = 0.0
    for i in range(len(logits)):
        total += np.float64(fractions[i] * powers[i])
    return total


def _fit_erf() -> tuple[float, ...]:
    """Coefficients of P, for erf(x) = x P(x^2 / 8 - 1) within 2e-8 where |x| <= 4."""

    def quotient(t: Any) -> Any:
        x = np.sqrt(8 * (t + 1))
        return np.vectorize(math.erf)(x) / x

    return tuple(Chebyshev.interpolate(quotient, 16).convert(kind=Polynomial).coef.tolist())


_ERF = _fit_erf()


@njit(cache=True, nogil=True, fastmath={"contract", "nnan", "nsz"})
def _gelu(y: Any) -> Any:
    """With a polynomial for math.erf, so that LLVM can vectorise it."""
    x = min(max(y * _SQRT_HALF, -4.0), 4.0)
    t = x * x / 8.0 - 1.0
    p = _ERF[-1]
    for power in range(len(_ERF) - 2, -1, -1):
        p = p * t + _ERF[power]
    return 0.5 * y * (1.0 + x * p)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _candidates(
    request: Any,  # REQUEST
    logits: Any,  # [V] float32
    values: Any,  # [K] out: the nucleus' logits at its temperature, largest first
    token_ids: Any,  # [K] out: their tokens
    mass: Any,  # logsumexp of the row's logits divided by the temperature
    is_top_given: Any,  # values, token_ids and mass are given, undivided, largest first
    temperature_applied: Any,
    maxima: Any,  # [V / block], words, fractions: [V]; scratch
    words: Any,
    fractions: Any,
) -> Any:
    """Steps 1 and 2 for one row. Returns the size of the nucleus."""
    if not is_top_given:
        _find_top(logits, values, token_ids, maxima)
    top, temperature = values[0], np.float32(1.0) if temperature_applied else request.temperature
    for i in range(len(values)):
        values[i] /= temperature
    top_k = request.top_k if request.top_k > 0 else len(logits)
    top_p, total = request.top_p, 1.0
    if top == -np.inf:  # no token is allowed
        values[0], token_ids[0], top_p = np.float32(0.0), 0, np.float32(1.0)
    if top_p < 1 and top_k > len(values):
        if is_top_given:
            total = math.exp(mass - values[0])
        else:
            total = _total(logits, top, temperature, words, fractions)
    return _nucleus_size(values, top_k, top_p, total)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _accept_cost(
    features: Any,  # [2W] u and A u
    candidate: Any,  # [2W] c and A c + b
    logprob: Any,
    network: Any,
    mixed: Any,  # [W], scratch
) -> Any:
    """-log of the probability that the proxy accepts: softplus(-accept logit)."""
    width = len(mixed)
    logprob = max(logprob, MIN_LOGPROB)
    for j in range(width):
        mixed[j] = candidate[width + j] + features[width + j] + logprob * network.logprob[j]
    for i in range(width):
        x = features[i] * candidate[i]
        for j in range(width):
            mixed[j] += x * network.product[i, j]
    logit = np.float64(network.bias)
    for j in range(width):
        logit += network.score[j] * _gelu(np.float64(mixed[j]))
    return math.log1p(math.exp(-abs(logit))) + max(-logit, 0.0)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _propose(
    shares: Any,  # [P] REQUEST, of the row's proxies
    position: Any,
    values: Any,  # [n] logits of the nucleus at its temperature, largest first
    token_ids: Any,  # [n or more] their tokens
    features: Any,  # [P or more, 2W]
    proxies: Any,
    times: Any,  # [n or more], scratch
    mixed: Any,  # [W], scratch
) -> Any:
    """Steps 3 and 4 for one row. Returns the emitted candidate, how many were proposed, and forced."""
    request = shares[0]
    count, key = len(values), np.uint64(request.key)
    total = 0.0
    for value in values:
        total += math.exp(value - values[0])
    log_total = values[0] + math.log(total)
    for i in range(count):
        if request.greedy:
            times[i] = i
        else:
            noise = _exponential(key, position, 2 * token_ids[i] + 1)
            times[i] = math.log(noise) - request.sharpness * (values[i] - log_total)
    best, best_score = 0, np.float32(-np.inf)
    proposed = 0
    while proposed < min(request.max_rejections, count):
        first = 0
        for i in range(1, count):
            if times[i] < times[first]:
                first = i
        times[first] = np.inf
        proposed += 1
        logprob = np.float32(values[first] - log_total)
        cost = 0.0  # a single candidate is accepted: there is no choice
        if count > 1:
            for i in range(len(shares)):
                p = shares[i].proxy
                network = _Network(
                    proxies.product[p],
                    proxies.logprob[p, 0],
                    proxies.score[p, :, 0],
                    proxies.bias[p, 0, 0],
                )
                candidate = proxies.tables[p, token_ids[first]]
                accept_cost = _accept_cost(features[i], candidate, logprob, network, mixed)
                cost += shares[i].strength * accept_cost
        if request.greedy:
            if np.float32(logprob - cost) > best_score:
                best, best_score = first, np.float32(logprob - cost)
        elif _exponential(key, position, 2 * token_ids[first] + 2) >= cost:
            return first, proposed, False
    if request.greedy and proposed > 0:
        return best, best + 1, False
    return 0, proposed, True


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _decide(
    logits: Any, top: Any, hidden: Any, proxies: Any, requests: Any, positions: Any, columns: Any
) -> None:
    """`decide_rows`, compiled."""
    if hidden.address != NOWHERE:
        shape = len(requests), hidden.rows.shape[1]
        halves = carray(_pointer(hidden.address), shape, np.int16)
        _project(halves, hidden.state, hidden.rows, hidden.projected)
    num_rows, vocab_size = requests[-1].row + 1, proxies.tables.shape[1]
    all_logits = carray(_pointer(logits.address), (num_rows, logits.stride), np.float32)
    all_halves = carray(_pointer(logits.address), (num_rows, logits.stride), np.int16)
    all_positions = carray(_pointer(positions), num_rows, np.int32)
    words, fractions = np.empty(vocab_size, np.uint32), np.empty(vocab_size, np.float32)
    floats, maxima = np.empty(vocab_size, np.float32), np.empty(vocab_size // _BLOCK, np.float32)
    times = np.empty(top.values.shape[1], np.float64)
    features = np.empty((len(proxies.product), hidden.projected.shape[1]), np.float32)
    mixed = np.empty(proxies.product.shape[1], np.float32)
    first = 0  # of the row's shares
    for a in range(columns.shape[1]):
        request = requests[first]
        shares = requests[first : first + request.num_shares]
        row = request.row
        row_logits = all_logits[row, :vocab_size]
        if logits.is_bfloat16 and not top.is_given:
            _widen(all_halves[row, :vocab_size], words, floats)
            row_logits = floats
        values, token_ids = top.values[a, : request.size], top.token_ids[a, : request.size]
        count = _candidates(
            request,
            row_logits,
            values,
            token_ids,
            top.mass[a],
            top.is_given,
            logits.temperature_applied,
            maxima,
            words,
            fractions,
        )
        norm = np.float32(0.0)
        for x in hidden.rows[first]:
            norm += x * x
        for i in range(len(shares)):
            features[i] = hidden.projected[first + i] / (math.sqrt(norm) + NORM_FLOOR)
        first += len(shares)
        slot, proposed, forced = _propose(
            shares,
            np.uint64(all_positions[row]),
            values[:count],
            token_ids,
            features,
            proxies,
            times,
            mixed,
        )
        columns[0, a] = slot
        columns[1, a] = token_ids[slot]
        columns[2, a] = proposed
        columns[3, a] = forced


@njit(
    void(
        *(int64, int64, boolean, boolean),  # Logits
        *(boolean, float32[:, ::1], int64[:, ::1], float32[::1]),  # Top
        *(int64, float32[:, ::1], float32[:, ::1], float32[:, ::1]),  # Hidden
        *(float32[:, :, ::1],) * 5,  # Proxies
        from_dtype(REQUEST)[::1],
        int64,
        int64[:, ::1],
    ),
    cache=True,
    nogil=True,
    fastmath={"contract", "reassoc"},
)
def _decide_unpacked(
    address: Any, stride: Any, is_bfloat16: Any, temperature_applied: Any,
    is_given: Any, values: Any, token_ids: Any, mass: Any,
    hidden: Any, state: Any, rows: Any, projected: Any,
    tables: Any, product: Any, logprob: Any, score: Any, bias: Any,
    requests: Any, positions: Any, columns: Any,
) -> None:  # fmt: skip
    """`_decide`. Its tuples are passed in parts: numba takes 5 microseconds longer to accept tuples."""
    _decide(
        Logits(address, stride, is_bfloat16, temperature_applied),
        Top(is_given, values, token_ids, mass),
        Hidden(hidden, state, rows, projected),
        Proxies(tables, product, logprob, score, bias),
        requests,
        positions,
        columns,
    )


def decide_rows(
    logits: Logits,
    top: Top,
    hidden: Hidden,
    proxies: Proxies,
    requests: np.ndarray,
    positions: int,
    columns: np.ndarray,
) -> None:
    """Decide A rows, as the module's docstring says.

    Args:
        logits, top, hidden, proxies: the inputs; what they point to has to outlive the call.
        requests: [S] REQUEST, their rows in ascending order.
        positions: address of [R] int32, the index of the token to be drawn.
        columns: [4, A] int64, the output: the columns of `acceptance.Decision`.
    """
    _decide_unpacked(*logits, *top, *hidden, *proxies, requests, positions, columns)
