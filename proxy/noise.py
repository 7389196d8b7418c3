"""The noise of accept/reject sampling: fresh, or a function of a request's seed.

R = logits rows, K = candidates.
"""

import torch
from torch import Tensor

# SplitMix64's constants, as signed numbers. The step from position to position is an odd number that
# is unrelated to them.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
POSITION_STEP = 0xD1342543DE82EF95 - 2**64


def draw_noise(rows: int, max_candidates: int, device: torch.device | str) -> Tensor:
    """Standard exponentials [R, 2, K] for `acceptance.decide`: race noise at index 0, acceptance noise at 1."""
    noise = torch.empty(rows, 2, max_candidates, device=device, dtype=torch.float32)
    return noise.exponential_()


def seeded_noise(
    keys: Tensor,  # [R] int64, from `noise_key`
    positions: Tensor,  # [R] int, index of the token that is drawn
    token_ids: Tensor,  # [R, K] int64, the candidates
) -> Tensor:
    """Like `draw_noise`, but a function of seed, position and token alone: [R, 2, K].

    So a seed gives the same draws alone and in any batch, on every tensor-parallel rank, after
    preemption, and in whatever order tied candidates come. The noise is a counter through the
    finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
    OOPSLA 2014). int64 multiplication wraps around, so it equals that of uint64.
    """
    kinds = torch.arange(1, 3, device=keys.device).unsqueeze(-1)  # race, acceptance
    counters = 2 * token_ids.unsqueeze(1) + kinds  # [R, 2, K]
    bits = (keys + positions.long() * POSITION_STEP).view(-1, 1, 1) + counters * GOLDEN_GAMMA
    bits = (bits ^ _shifted(bits, 30)) * MIX[0]
    bits = (bits ^ _shifted(bits, 27)) * MIX[1]
    bits = bits ^ _shifted(bits, 31)
    uniforms = (_shifted(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    return uniforms.log().neg().float()


def noise_key(seed: int) -> int:
    """A request's seed, any int, as a key for `seeded_noise`; similar seeds give unrelated keys."""
    mask = 2**64 - 1
    bits = (seed + GOLDEN_GAMMA) & mask
    bits = ((bits ^ (bits >> 30)) * MIX[0]) & mask
    bits = ((bits ^ (bits >> 27)) * MIX[1]) & mask
    bits ^= bits >> 31
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical right shift of int64, whose own shift copies the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)
