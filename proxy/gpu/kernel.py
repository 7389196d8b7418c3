"""Accept/reject sampling on a GPU: two kernels that decide all rows of a batch.

`proxy.acceptance` is the definition, and `proxy.network` that of the scores. As tensor functions they
are some sixty small operations, whose launches cost a small LLM more than its own sampler. Given the
same noise, kernels and definition decide alike, up to rounding (`tests/proxy/gpu_kernel.py`).

`read_kernel` reads what is large, in parallel:

1. The largest of each group of `GROUP` logits, and of each block of `BLOCK`. For a row with a top-p, which
   needs the mass of the whole vocabulary, of each chunk the sum of the exponentials over the temperature.
2. The product of the hidden states with the first layer of the rows' proxies, a slice of H at a time.

`decide_kernel` decides, one program a row:

1. The K largest logits are in K of the groups, and these in K of the blocks: those of the largest
   maxima, the first one first among equal ones. So the K largest are found three times, each time
   among few.
2. The nucleus, the accept logits, the noise and the decision, as in the definition. The noise is
   always a hash of the request's key, the position and the token, as in `noise.seeded_noise`.

Triton's float32 exp and log have an absolute error of some 1e-7. Where that is not enough, for the
noise and the cost near 0, they are computed in float64.

Triton reads a kernel's constants from this file: a test holds them equal to those of `noise`,
`acceptance` and `network`. For that the file is longer than 300 lines, and the two kernels than 60: what
a kernel keeps in registers cannot be handed to another one.
"""

import math

import torch
import triton
import triton.language as tl

# As in proxy.noise, proxy.acceptance and proxy.network.
GOLDEN_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
POSITION_STEP = tl.constexpr(0xD1342543DE82EF95 - 2**64)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
MIX_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
UNDERFLOW = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))
MIN_LOGPROB = tl.constexpr(-20.0)
NORM_FLOOR = tl.constexpr(1e-6)

GROUP = tl.constexpr(32)  # logits
BLOCK = tl.constexpr(1024)  # logits
CHUNK = tl.constexpr(4096)  # logits that one program of `read_kernel` reads
TILE = tl.constexpr(16)  # rows multiplied at once
SLICE = tl.constexpr(64)  # of H, multiplied by one program
_GROUPS = tl.constexpr(BLOCK.value // GROUP.value)  # of a block
_CHUNK_GROUPS = tl.constexpr(CHUNK.value // GROUP.value)
_CHUNK_BLOCKS = tl.constexpr(CHUNK.value // BLOCK.value)

# The columns of a row's settings.
INTEGERS = ("row", "proxy", "size", "max_rejections", "key", "top_k", "greedy")  # int64
FLOATS = ("top_p", "temperature", "sharpness", "strength")  # float32
_NUM_INTEGERS, _NUM_FLOATS = tl.constexpr(len(INTEGERS)), tl.constexpr(len(FLOATS))

_PRECISION = tl.constexpr("tf32x3")  # on tensor cores, nearly as precise as float32
_NO_KEY = tl.constexpr(-(2**63))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_COUNTS = ["num_rows", "num_tiles", "temperature_applied"]
"""Arguments that change with the batch: specialised for, they would compile the kernel anew."""


@triton.jit
def _keys(values, index, exists):
    """float32 values and their indices as int64: the largest value, and then the smallest index, is the largest."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))
    return tl.where(exists, keys, _NO_KEY)


@triton.jit
def _indices(keys):
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit
def _values(keys):
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(keys == _NO_KEY, -float("inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _top_members(numbers, keys, size: tl.constexpr, count, BLOCK_K: tl.constexpr):
    """The keys of the largest `numbers` among the members of some sets, `size` consecutive ones each."""
    index = (_indices(keys) * size)[:, None] + tl.arange(0, size)[None, :]
    exists = (keys != _NO_KEY)[:, None] & (index < count)
    values = tl.load(numbers + index, mask=exists, other=-float("inf")).to(tl.float32)
    return tl.topk(tl.reshape(_keys(values, index, exists), (BLOCK_K * size,)), BLOCK_K)


@triton.jit(do_not_specialize=_COUNTS)
def read_kernel(
    logits,  # [R, V] float32 or bfloat16
    logits_stride,
    hidden,  # [R, H] float32 or bfloat16
    hidden_stride,
    integers,  # [A, INTEGERS]
    floats,  # [A, FLOATS]
    tiles,  # [T, TILE] int32, rows of one proxy, indices into A; -1 = none
    state,  # [P, 2W, H]
    group_max,  # out: [A, groups]
    block_max,  # out: [A, blocks]
    chunk_sum,  # out: [A, 2, chunks], the largest exponent and the sum; not where top_p is 1
    features,  # out: [slices, A, 2W], to be summed over the slices
    norms,  # out: [slices, A], of squares
    num_rows,
    num_tiles,
    temperature_applied,
    V: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_2W: tl.constexpr,
):
    """Grid: T x slices programs for the products, then A x chunks for the logits."""
    num_slices: tl.constexpr = (H + SLICE - 1) // SLICE
    num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
    num_blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    num_groups: tl.constexpr = (V + GROUP - 1) // GROUP
    program = tl.program_id(0)
    num_products = num_tiles * num_slices
    if program < num_products:
        tile, part = program // num_slices, program % num_slices
        members = tl.load(tiles + tile * TILE + tl.arange(0, TILE))
        is_row = members >= 0
        members = tl.where(is_row, members, 0).to(tl.int64)
        first = tl.load(tiles + tile * TILE).to(tl.int64)
        proxy = tl.load(integers + first * _NUM_INTEGERS + 1)
        rows = tl.load(integers + members * _NUM_INTEGERS)
        columns = tl.arange(0, BLOCK_2W)
        h = part * SLICE + tl.arange(0, SLICE)
        x = tl.load(
            hidden + rows[:, None] * hidden_stride + h[None, :],
            mask=is_row[:, None] & (h < H)[None, :],
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(
            state + (proxy * 2 * W + columns[None, :]) * H + h[:, None],
            mask=(columns < 2 * W)[None, :] & (h < H)[:, None],
            other=0.0,
        )
        product = tl.dot(x, weights, input_precision=_PRECISION)
        squares = tl.sum(x * x, 1)
        places = part.to(tl.int64) * num_rows + members
        tl.store(
            features + places[:, None] * (2 * W) + columns[None, :],
            product,
            mask=is_row[:, None] & (columns < 2 * W)[None, :],
        )
        tl.store(norms + places, squares, mask=is_row)
    else:
        program -= num_products
        of_row, chunk = (program // num_chunks).to(tl.int64), program % num_chunks
        row = tl.load(integers + of_row * _NUM_INTEGERS)
        temperature = tl.load(floats + of_row * _NUM_FLOATS + 1)
        temperature = tl.where(temperature_applied != 0, 1.0, temperature)
        group = chunk * _CHUNK_GROUPS + tl.arange(0, _CHUNK_GROUPS)
        token_ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        values = tl.load(
            logits + row * logits_stride + token_ids, mask=token_ids < V, other=-float("inf")
        ).to(tl.float32)
        of_groups = tl.max(values, 1)
        tl.store(group_max + of_row * num_groups + group, of_groups, mask=group < num_groups)
        block = chunk * _CHUNK_BLOCKS + tl.arange(0, _CHUNK_BLOCKS)
        of_blocks = tl.max(tl.reshape(of_groups, (_CHUNK_BLOCKS, _GROUPS)), 1)
        tl.store(block_max + of_row * num_blocks + block, of_blocks, mask=block < num_blocks)
        if tl.load(floats + of_row * _NUM_FLOATS) < 1.0:
            largest = tl.max(of_blocks, 0) / temperature
            largest = tl.maximum(largest, -_LARGEST)  # no NaN where all are -inf
            total = tl.sum(tl.sum(tl.exp(values / temperature - largest), 1), 0)
            tl.store(chunk_sum + of_row * 2 * num_chunks + chunk, largest)
            tl.store(chunk_sum + (of_row * 2 + 1) * num_chunks + chunk, total)


@triton.jit
def _log_mass(values):
    """logsumexp of numbers, the largest of which is finite."""
    largest = tl.max(values, 0)
    return largest + tl.log(tl.sum(tl.exp(values - largest), 0))


@triton.jit
def _exponentials(base, token_ids, kind: tl.constexpr):
    """As `noise.seeded_noise`: standard exponentials, for the race (kind 1) or the acceptance (2)."""
    bits = base + (2 * token_ids + kind) * GOLDEN_GAMMA
    bits = (bits ^ _shifted(bits, 30)) * MIX_1
    bits = (bits ^ _shifted(bits, 27)) * MIX_2
    bits = bits ^ _shifted(bits, 31)
    uniforms = (_shifted(bits, 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return (-tl.log(uniforms)).to(tl.float32)


@triton.jit
def _shifted(bits, by: tl.constexpr):
    """Logical right shift of int64."""
    return (bits.to(tl.uint64, bitcast=True) >> by).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=_COUNTS)
def decide_kernel(
    logits,  # [R, V] float32 or bfloat16
    logits_stride,
    positions,  # [R or more] int32 or int64, index of the token that is drawn
    integers,  # [A, INTEGERS]
    floats,  # [A, FLOATS]
    group_max,  # [A, groups], and the four below: from `read_kernel`
    block_max,
    chunk_sum,
    features,
    norms,
    tables,  # [P, V, 2W] float32, and the weights of P proxies
    product,  # [P, W, W]
    logprob,  # [P, 1, W]
    score,  # [P, W, 1]
    bias,  # [P, 1, 1]
    columns,  # out: [4, A] int64, `acceptance.Decision`
    num_rows,
    temperature_applied,
    V: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
):
    """Grid: A programs."""
    num_slices: tl.constexpr = (H + SLICE - 1) // SLICE
    num_chunks: tl.constexpr = (V + CHUNK - 1) // CHUNK
    num_blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    num_groups: tl.constexpr = (V + GROUP - 1) // GROUP
    of_row = tl.program_id(0).to(tl.int64)
    integers += of_row * _NUM_INTEGERS
    floats += of_row * _NUM_FLOATS
    row, proxy = tl.load(integers), tl.load(integers + 1)
    size, max_rejections = tl.load(integers + 2), tl.load(integers + 3)
    key, top_k, greedy = tl.load(integers + 4), tl.load(integers + 5), tl.load(integers + 6) != 0
    top_p, temperature = tl.load(floats), tl.load(floats + 1)
    sharpness, strength = tl.load(floats + 2), tl.load(floats + 3)
    temperature = tl.where(temperature_applied != 0, 1.0, temperature)

    # The largest logits, in order.
    block = tl.arange(0, BLOCK_BLOCKS)
    exists = block < num_blocks
    values = tl.load(block_max + of_row * num_blocks + block, mask=exists, other=-float("inf"))
    keys = tl.topk(_keys(values, block, exists), BLOCK_K)
    keys = _top_members(group_max + of_row * num_groups, keys, _GROUPS, num_groups, BLOCK_K)
    keys = _top_members(logits + row * logits_stride, keys, GROUP, V, BLOCK_K)
    token_ids = tl.where(keys == _NO_KEY, 0, _indices(keys))
    values = tl.div_rn(_values(keys), temperature)

    # The nucleus.
    ranks = tl.arange(0, BLOCK_K)
    nothing: tl.constexpr = -float("inf")
    values = tl.where(ranks == 0, tl.maximum(values, -_LARGEST), values)
    values = tl.where(ranks < size, values, nothing)
    last = tl.max(tl.where(ranks == top_k - 1, values, nothing), 0)
    values = tl.where((values >= last) | (top_k > size), values, nothing)
    if top_p < 1.0:
        chunk = tl.arange(0, BLOCK_CHUNKS)
        inside = chunk < num_chunks
        chunk_sum += of_row * 2 * num_chunks
        largest = tl.load(chunk_sum + chunk, mask=inside, other=nothing)
        sums = tl.load(chunk_sum + num_chunks + chunk, mask=inside, other=0.0)
        highest = tl.max(largest, 0)
        whole = highest + tl.log(tl.sum(sums * tl.exp(largest - highest), 0))
        mass = tl.where(top_k <= size, _log_mass(values), whole)
        probs = tl.exp(values - mass)
        mass_before = tl.cumsum(probs, 0) - probs
        values = tl.where((mass_before >= top_p) & (ranks > 0), nothing, values)
    logprobs = values - _log_mass(values)
    logprobs = tl.where(logprobs > UNDERFLOW, logprobs, nothing)
    are_inside = logprobs > nothing

    # The accept logits.
    w = tl.arange(0, BLOCK_W)
    is_w = w < W
    part = tl.arange(0, BLOCK_SLICES)
    place = part.to(tl.int64) * num_rows + of_row
    squares = tl.sum(tl.load(norms + place, mask=part < num_slices, other=0.0), 0)
    entries = features + place[:, None] * (2 * W) + w[None, :]
    mask = (part < num_slices)[:, None] & is_w[None, :]
    u = tl.sum(tl.load(entries, mask=mask, other=0.0), 0)
    from_state = tl.sum(tl.load(entries + W, mask=mask, other=0.0), 0)
    norm = tl.sqrt_rn(squares) + NORM_FLOOR
    u = tl.div_rn(u, norm)
    from_state = tl.div_rn(from_state, norm)
    entries = tables + (proxy * V + token_ids)[:, None] * (2 * W) + w[None, :]
    mask = are_inside[:, None] & is_w[None, :]
    c = tl.load(entries, mask=mask, other=0.0)
    from_candidate = tl.load(entries + W, mask=mask, other=0.0)
    of_logprob = tl.load(logprob + proxy * W + w, mask=is_w, other=0.0)
    of_product = tl.load(
        product + proxy * W * W + w[:, None] * W + w[None, :],
        mask=is_w[:, None] & is_w[None, :],
        other=0.0,
    )
    feature = tl.maximum(logprobs, MIN_LOGPROB)
    mixed = from_candidate + from_state[None, :] + feature[:, None] * of_logprob[None, :]
    mixed += tl.dot(c * u[None, :], of_product, input_precision=_PRECISION)
    activation = 0.5 * mixed * (1.0 + tl.erf(mixed * 0.7071067811865476))
    weights = tl.load(score + proxy * W + w, mask=is_w, other=0.0)
    accept_logits = tl.sum(activation * weights[None, :], 1) + tl.load(bias + proxy)

    # The decision.
    position = tl.load(positions + row).to(tl.int64)
    base = key + position * POSITION_STEP
    times = tl.log(_exponentials(base, token_ids, 1)) - logprobs * sharpness
    times = tl.where(greedy, ranks.to(tl.float32), times)
    times = tl.where(are_inside, times, float("inf"))
    x = accept_logits.to(tl.float64)
    cost = (tl.maximum(-x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))).to(tl.float32)  # softplus(-x)
    has_one = tl.sum(are_inside.to(tl.int32), 0) <= 1
    cost = tl.where(has_one, 0.0, cost * strength)
    is_considered = are_inside & (ranks < max_rejections)
    best = tl.argmax(tl.where(is_considered, logprobs - cost, nothing), 0)
    accepts = _exponentials(base, token_ids, 2) >= cost
    accepts = tl.where(greedy, ranks == best, accepts)
    of_accepted = tl.where(accepts, times, float("inf"))
    first_time, first_slot = tl.min(of_accepted, 0), tl.argmin(of_accepted, 0)
    num_before = tl.sum((times < first_time).to(tl.int64), 0)
    forced = (first_time == float("inf")) | (num_before >= max_rejections)
    slot = tl.where(forced, 0, first_slot).to(tl.int64)
    token_id = tl.sum(tl.where(ranks == slot, token_ids, 0), 0)
    num_proposed = tl.minimum(tl.where(forced, num_before, num_before + 1), max_rejections)
    tl.store(columns + of_row, slot)
    tl.store(columns + num_rows + of_row, token_id)
    tl.store(columns + 2 * num_rows + of_row, num_proposed)
    tl.store(columns + 3 * num_rows + of_row, forced.to(tl.int64))
