"""The law that turns logits and a proxy's scores into a token (arXiv 2403.04283).

The paper's loop, for one position: the LLM proposes a token drawn from its nucleus, the proxy
accepts it or throws it away; a rejected token is not proposed again at this position; when the
nucleus is exhausted, or after `max_rejections` rejections, the LLM's most probable token is taken.

The same law without the loop. Drawing from the renormalised nucleus without replacement gives the
order in which independent exponential clocks of rates p ring, so one draw per candidate settles
the order of all proposals; one coin per candidate settles every answer; the first candidate in
that order whose coin came up is emitted. One LLM forward per emitted token instead of one per
candidate. `decide` is the whole of it; the server's samplers and the trainer's rollout all call it.

Temperature. A proxy is trained at one temperature T0 and asked at any other T. The nucleus, and with
it p and what the proxy sees, is always that of T0. Proposals are drawn by p^(T0 / T): temperature
sharpens what is proposed, strength (a^strength) what is accepted. At T = 0 nothing is drawn: the
candidate of largest log p + strength log a is taken.

R = logits rows, V = vocabulary, K = candidates. Nothing here synchronises with the device.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # -87.3

_SPARE = 16

# SplitMix64's constants, as signed numbers; the step from position to position is an odd number
# that has nothing to do with them.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
POSITION_STEP = 0xD1342543DE82EF95 - 2**64


class Candidates(NamedTuple):
    """What the LLM may say at each of R positions, the most probable first."""

    token_ids: Tensor  # [R, K] int64
    logprobs: Tensor  # [R, K] float32, natural log, renormalised; -inf = outside the nucleus


@dataclass(frozen=True)
class Decision:
    """What is said at each of R positions, and how it came about."""

    columns: Tensor  # [4, R] int64, the four below: a step keeps and copies one thing, not four

    @cached_property
    def on_host(self) -> Any:
        """The columns as a numpy array: waits for the device."""
        return self.columns.cpu().numpy()

    @property
    def slots(self) -> Tensor:
        """[R] index into K of the emitted candidate."""
        return self.columns[0]

    @cached_property
    def token_ids(self) -> Tensor:
        """[R]"""
        return self.columns[1]

    @property
    def num_proposed(self) -> Tensor:
        """[R] candidates put to the proxy, the accepted one included."""
        return self.columns[2]

    @property
    def forced(self) -> Tensor:
        """[R] bool, nothing was accepted: the most probable candidate was emitted."""
        return self.columns[3].bool()


def nucleus(
    logits: Tensor,  # [R, V]; -inf = forbidden by a constraint
    max_candidates: int,
    top_k: Tensor | None = None,  # [R] int, V = off
    top_p: Tensor | None = None,  # [R] float, 1 = off
    *,
    temperature: Tensor | None = None,  # [R] float, > 0; None = 1 everywhere
    sizes: Tensor | None = None,  # [R] int, at most so many candidates; None = max_candidates
) -> Candidates:
    """The candidates of each row: temperature, top-k, top-p, then at most `max_candidates` of them.

    For a proxy the temperature is the one that it was trained at, whatever the request asks for.

    As in vLLM, top-p counts probabilities renormalised after top-k and keeps a token while the
    mass before it is below p, and tokens that tie with the k-th are all kept (as far as K goes).
    The most probable token always stays. Tokens whose probability underflows are out: the LLM
    would never say them, but a proxy that rejects all others would get to them, and so to tokens
    that a logit_bias of -100 bans. A row in which nothing is allowed has one candidate, token 0:
    it is what vLLM samples there.

    The vocabulary is never sorted: one topk(K), and one logsumexp if there is a top-p. One
    approximation follows: where K < top_k < V, the mass is counted over the whole vocabulary
    instead of the top_k tokens.
    """
    values, token_ids = most_probable(logits, max_candidates)  # [R, K] both
    num_slots = values.shape[-1]
    values = values.float()
    if temperature is not None:
        values = values / temperature.unsqueeze(-1)
    values[:, :1].clamp_(min=torch.finfo(torch.float32).min)  # where nothing is allowed: no NaN
    most: int | Tensor = num_slots
    if sizes is not None:  # before all else: a row must not depend on its neighbours' sizes
        most = sizes.unsqueeze(-1)
        ranks = torch.arange(num_slots, device=logits.device)
        values = values.masked_fill(ranks >= most, -math.inf)
    if top_k is not None:
        last = values.gather(-1, (top_k.long() - 1).clamp(0, num_slots - 1).unsqueeze(-1))
        is_inside = (values >= last) | (top_k.unsqueeze(-1) > most)
        values = values.masked_fill(~is_inside, -math.inf)
    if top_p is not None:
        scaled = logits if temperature is None else logits / temperature.unsqueeze(-1)
        mass = scaled.float().logsumexp(-1, keepdim=True)
        if top_k is not None:
            kept = values.logsumexp(-1, keepdim=True)
            mass = torch.where(top_k.unsqueeze(-1) <= most, kept, mass)
        probs = (values - mass).exp()
        mass_before = probs.cumsum(-1) - probs
        p = top_p.unsqueeze(-1)
        is_outside = (mass_before >= p) & (p < 1)  # rounding must not let p = 1 remove anything
        is_outside[:, 0] = False
        values = values.masked_fill(is_outside, -math.inf)
    return Candidates(token_ids, F.threshold(values.log_softmax(-1), UNDERFLOW, -math.inf))


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of [R, V] logits, largest first, and their token ids: [R, count] both, or [R, V].

    Of equal ones the first tokens come first, as argmax has it: what topk makes of them depends
    on how many it is asked for. (It is asked for a few more, so that ties at the end are whole.)
    Where all are -inf, token 0 comes first.
    """
    values, token_ids = logits.topk(min(count + _SPARE, logits.shape[-1]), dim=-1)
    token_ids, order = token_ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    token_ids = token_ids.gather(-1, order)
    token_ids[:, :1].masked_fill_(values[:, :1] == -math.inf, 0)
    return values[:, :count], token_ids[:, :count]


def nucleus_alike(
    logits: Tensor, temperature: float, top_k: int, top_p: float, max_candidates: int
) -> Candidates:
    """`nucleus`, of [R, V] logits that are all decoded alike; top-k 0 = off."""
    rows, vocab_size = logits.shape
    return nucleus(
        logits.float() / temperature,
        min(max_candidates, vocab_size),
        torch.full((rows,), top_k or vocab_size, device=logits.device),
        torch.full((rows,), top_p, device=logits.device),
    )


def narrower(one: int, other: int) -> int:
    """The smaller of two top-k, of which 0 is no limit."""
    return min(one, other) if one and other else one or other


def draw_noise(rows: int, max_candidates: int, device: torch.device | str) -> Tensor:
    """Standard exponentials [R, 2, K] for `decide`: the race at index 0, the coins at index 1."""
    noise = torch.empty(rows, 2, max_candidates, device=device, dtype=torch.float32)
    return noise.exponential_()


def seeded_noise(
    keys: Tensor,  # [R] int64, from `noise_key`
    positions: Tensor,  # [R] int, index of the token that is drawn
    token_ids: Tensor,  # [R, K] int64, the candidates
) -> Tensor:
    """The same as a function of seed, position and token alone: [R, 2, K] standard exponentials.

    So a seed gives the same draws alone and in any batch, on every tensor-parallel rank, after
    preemption, and in whatever order tied candidates come. A counter goes through the finaliser
    of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA
    2014); int64 multiplication wraps, and so serves for uint64.
    """
    kinds = torch.arange(1, 3, device=keys.device).unsqueeze(-1)  # race, coin
    counters = 2 * token_ids.unsqueeze(1) + kinds  # [R, 2, K]
    bits = (keys + positions.long() * POSITION_STEP).view(-1, 1, 1) + counters * GOLDEN_GAMMA
    bits = (bits ^ _shifted(bits, 30)) * MIX[0]
    bits = (bits ^ _shifted(bits, 27)) * MIX[1]
    bits = bits ^ _shifted(bits, 31)
    uniforms = (_shifted(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    return uniforms.log().neg().float()


def noise_key(seed: int) -> int:
    """A request's seed, any int, as a key for `seeded_noise`; neighbouring seeds become strangers."""
    mask = 2**64 - 1
    bits = (seed + GOLDEN_GAMMA) & mask
    bits = ((bits ^ (bits >> 30)) * MIX[0]) & mask
    bits = ((bits ^ (bits >> 27)) * MIX[1]) & mask
    bits ^= bits >> 31
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right of int64, whose own shift copies the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def proposal_times(
    candidates: Candidates,
    race: Tensor,  # [R, K] standard exponentials
    *,
    sharpness: Tensor | None = None,  # [R] float, T0 / T; None = 1 everywhere
    greedy: Tensor | None = None,  # [R] bool; None = no row
) -> Tensor:
    """When each candidate is proposed: [R, K], lower = earlier, +inf = never (not in the nucleus).

    A clock of rate p^sharpness rings at race / p^sharpness; the order in which the clocks ring is
    that of sampling without replacement. Its logarithm is returned, which orders alike and cannot
    overflow. Greedy rows propose by probability: 0, 1, 2...
    """
    rates = candidates.logprobs
    if sharpness is not None:
        rates = rates * sharpness.unsqueeze(-1)
    times = race.log() - rates
    if greedy is None:
        return times
    ranks = torch.arange(times.shape[-1], device=times.device, dtype=times.dtype)
    ranks = ranks.masked_fill(candidates.logprobs == -math.inf, math.inf)
    return torch.where(greedy.unsqueeze(-1), ranks, times)


def accept_mask(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    coins: Tensor,  # [R, K] standard exponentials
    *,
    strength: Tensor | None,  # [R] float, >= 0; None = 1 everywhere
    max_rejections: Tensor,  # [R] int
    greedy: Tensor | None = None,  # [R] bool; None = no row
) -> Tensor:
    """What the proxy answers if it is asked: [R, K] bool, True = accept.

    It accepts with probability a^strength, a = sigmoid(accept_logit). An exponential coin E comes
    up so, for P(E >= x) = exp(-x) and -log a = softplus(-accept_logit). Greedy rows flip no coin:
    the one candidate of `greedy_slots` is accepted. A row with one candidate accepts it: there is
    no choice. What it says of slots outside the nucleus means nothing.
    """
    cost = F.softplus(-accept_logits)
    if strength is not None:
        cost = cost * strength.unsqueeze(-1)
    has_one = (candidates.logprobs[:, 1:] == -math.inf).all(-1, keepdim=True)
    cost = cost.masked_fill(has_one, 0.0)
    accepts = coins >= cost
    if greedy is None:
        return accepts
    best = greedy_slots(candidates, cost, max_rejections)
    slots = torch.arange(cost.shape[-1], device=cost.device)
    return torch.where(greedy.unsqueeze(-1), slots == best.unsqueeze(-1), accepts)


def greedy_slots(
    candidates: Candidates,
    cost: Tensor,  # [R, K] -log of the probability that the proxy accepts, strength included
    max_rejections: Tensor,  # [R] int
) -> Tensor:
    """The candidate that a greedy row takes: [R], the slot of largest log p - cost.

    At most `max_rejections` candidates are put to the proxy, at temperature 0 as at any other: it
    is asked about the most probable ones. Of equal ones the most probable is taken.
    """
    ranks = torch.arange(cost.shape[-1], device=cost.device)
    score = candidates.logprobs - cost
    return score.masked_fill(ranks >= max_rejections.unsqueeze(-1), -math.inf).argmax(-1)


def settle(
    candidates: Candidates,
    times: Tensor,  # [R, K] from `proposal_times`
    accepts: Tensor,  # [R, K] from `accept_mask`
    max_rejections: Tensor,  # [R] int
) -> Decision:
    """The first accepted candidate of each row, or the most probable one where there is none.

    `max_rejections` = 0 asks the proxy nothing and takes the most probable token.
    """
    first_time, first_slot = torch.where(accepts, times, math.inf).min(-1)  # [R] both
    num_before = (times < first_time.unsqueeze(-1)).sum(-1)  # rejected if all of them were asked
    forced = (first_time == math.inf) | (num_before >= max_rejections)
    slots = first_slot.masked_fill(forced, 0)
    token_ids = candidates.token_ids.gather(-1, slots.unsqueeze(-1)).squeeze(-1)
    num_proposed = torch.minimum(num_before + ~forced, max_rejections)
    return Decision(torch.stack((slots, token_ids, num_proposed, forced.long())))


def decide(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    noise: Tensor,  # [R, 2, K] from `draw_noise` or `seeded_noise`
    *,
    strength: Tensor | None,  # [R] float, 0 = accept everything, 1 = as trained, more = stricter
    max_rejections: Tensor,  # [R] int
    sharpness: Tensor | None = None,  # [R] float, T0 / T
    greedy: Tensor | None = None,  # [R] bool
) -> Decision:
    """The whole law: order of proposal, answers, decision. None as in the parts above."""
    race, coins = noise.unbind(1)
    times = proposal_times(candidates, race, sharpness=sharpness, greedy=greedy)
    accepts = accept_mask(
        candidates,
        accept_logits,
        coins,
        strength=strength,
        max_rejections=max_rejections,
        greedy=greedy,
    )
    return settle(candidates, times, accepts, max_rejections)


def proposed_mask(times: Tensor, decision: Decision) -> Tensor:
    """Which slots were put to the proxy: [R, K] bool, True = proposed.

    The emitted slot of an unforced row was accepted; every other proposed slot was rejected.
    Rows with a single candidate are marked too, although no coin decided them.
    """
    ranks = times.argsort(-1).argsort(-1)
    return ranks < decision.num_proposed.unsqueeze(-1)
