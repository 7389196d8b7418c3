"""The law that turns logits and a proxy's scores into a token (arXiv 2403.04283).

The paper's loop, for one position: the LLM proposes a token drawn from its nucleus, the proxy
accepts it or throws it away; a rejected token is not proposed again at this position; when the
nucleus is exhausted, or after `max_rejections` rejections, the LLM's most probable token is taken.

The same law without the loop. Drawing from the renormalised nucleus without replacement gives the
order in which independent exponential clocks of rates p ring, so one draw per candidate settles
the order of all proposals; one coin per candidate settles every answer; the first candidate in
that order whose coin came up is emitted. One LLM forward per emitted token instead of one per
candidate. `decide` is the whole of it; the server's sampler and the trainer's rollout both call it.

R = logits rows, V = vocabulary, K = candidates. Nothing here synchronises with the device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # -87.3


class Candidates(NamedTuple):
    """What the LLM may say at each of R positions, the most probable first."""

    token_ids: Tensor  # [R, K] int64
    logprobs: Tensor  # [R, K] float32, natural log, renormalised; -inf = outside the nucleus


class Decision(NamedTuple):
    """What is said at each of R positions, and how it came about."""

    slots: Tensor  # [R] int64, index into K of the emitted candidate
    token_ids: Tensor  # [R] int64
    num_proposed: Tensor  # [R] int64, candidates put to the proxy, the accepted one included
    forced: Tensor  # [R] bool, nothing was accepted: the most probable candidate was emitted


def nucleus(
    logits: Tensor,  # [R, V] float32, divided by temperature; -inf = forbidden by a constraint
    max_candidates: int,
    top_k: Tensor | None = None,  # [R] int, V = off
    top_p: Tensor | None = None,  # [R] float, 1 = off
) -> Candidates:
    """The candidates of each row: top-k, then top-p, then at most `max_candidates` of them.

    As in vLLM, top-p counts probabilities renormalised after top-k and keeps a token while the
    mass before it is below p, and tokens that tie with the k-th are all kept (as far as K goes).
    The most probable token always stays. Tokens whose probability underflows are out: the LLM
    would never say them, but a proxy that rejects all others would get to them, and so to tokens
    that a logit_bias of -100 bans.

    The vocabulary is never sorted: one topk(K), and one logsumexp if there is a top-p. One
    approximation follows: where K < top_k < V, the mass is counted over the whole vocabulary
    instead of the top_k tokens.
    """
    values, token_ids = logits.topk(min(max_candidates, logits.shape[-1]), dim=-1)  # [R, K] both
    num_slots = values.shape[-1]
    inside = values - values[:, :1] > _UNDERFLOW
    if top_k is not None:
        last = (top_k.long() - 1).clamp(0, num_slots - 1).unsqueeze(-1)
        inside &= (values >= values.gather(-1, last)) | (top_k.unsqueeze(-1) > num_slots)
    if top_p is not None:
        mass = logits.logsumexp(-1, keepdim=True)
        if top_k is not None:
            kept = values.masked_fill(~inside, -math.inf).logsumexp(-1, keepdim=True)
            mass = torch.where(top_k.unsqueeze(-1) <= num_slots, kept, mass)
        probs = (values - mass).exp()
        mass_before = probs.cumsum(-1) - probs
        p = top_p.unsqueeze(-1)
        inside &= (mass_before < p) | (p >= 1)  # rounding must not let p = 1 remove anything
    inside[:, 0] = True
    return Candidates(token_ids, values.masked_fill(~inside, -math.inf).log_softmax(-1))


def draw_noise(
    rows: int,
    max_candidates: int,
    device: torch.device | str,
    generators: dict[int, torch.Generator] | None = None,  # row -> its own source of randomness
) -> Tensor:
    """Standard exponentials [R, 2, K] for `decide`: the race at index 0, the coins at index 1.

    A row with its own generator gets the same noise whatever else is in the batch.
    """
    noise = torch.empty(rows, 2, max_candidates, device=device, dtype=torch.float32)
    generators = generators or {}
    if len(generators) < rows:
        noise.exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return noise


def proposal_times(
    candidates: Candidates,
    race: Tensor,  # [R, K] standard exponentials
    greedy: Tensor,  # [R] bool
) -> Tensor:
    """When each candidate is proposed: [R, K], lower = earlier, +inf = never (not in the nucleus).

    A clock of rate p rings at race / p; the order in which the clocks ring is that of sampling
    without replacement. Its logarithm is returned, which orders alike and cannot overflow.
    Greedy rows propose by probability: 0, 1, 2...
    """
    num_slots = race.shape[-1]
    ranks = torch.arange(num_slots, device=race.device, dtype=race.dtype)
    times = torch.where(greedy.unsqueeze(-1), ranks, race.log() - candidates.logprobs)
    return times.masked_fill(candidates.logprobs == -math.inf, math.inf)


def accept_mask(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    coins: Tensor,  # [R, K] standard exponentials
    *,
    strength: Tensor,  # [R] float, >= 0
    greedy: Tensor,  # [R] bool
) -> Tensor:
    """What the proxy answers if it is asked: [R, K] bool, True = accept.

    It accepts with probability a^strength, a = sigmoid(accept_logit). An exponential coin E comes
    up so, for P(E >= x) = exp(-x) and -log a = softplus(-accept_logit). Greedy rows flip no coin:
    they accept where a^strength >= 1/2. A row with one candidate accepts it: there is no choice.
    """
    cost = strength.unsqueeze(-1) * F.softplus(-accept_logits.float())
    accepts = torch.where(greedy.unsqueeze(-1), cost <= math.log(2), coins >= cost)
    inside = candidates.logprobs > -math.inf
    return inside & (accepts | (inside.sum(-1, keepdim=True) == 1))


def decide(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K]
    noise: Tensor,  # [R, 2, K] from `draw_noise`
    *,
    strength: Tensor,  # [R] float, 0 = accept everything, 1 = the proxy as trained, more = stricter
    max_rejections: Tensor,  # [R] int
    greedy: Tensor,  # [R] bool
) -> Decision:
    """The first accepted candidate of each row, or the most probable one where there is none.

    `max_rejections` = 0 asks the proxy nothing and takes the most probable token (unless the row
    has but one candidate, which always counts as proposed and accepted).
    """
    inside = candidates.logprobs > -math.inf
    times = proposal_times(candidates, noise[:, 0], greedy)
    accepts = accept_mask(candidates, accept_logits, noise[:, 1], strength=strength, greedy=greedy)
    first_time, first_slot = times.masked_fill(~accepts, math.inf).min(-1)  # [R] both
    num_before = (times < first_time.unsqueeze(-1)).sum(-1)  # rejected if all of them were asked
    size = inside.sum(-1)
    single = size == 1
    forced = ~single & (~accepts.any(-1) | (num_before >= max_rejections))
    slots = first_slot.masked_fill(forced, 0)
    return Decision(
        slots=slots,
        token_ids=candidates.token_ids.gather(-1, slots.unsqueeze(-1)).squeeze(-1),
        num_proposed=torch.where(forced, torch.minimum(size, max_rejections), num_before + 1),
        forced=forced,
    )


def proposed_mask(times: Tensor, decision: Decision) -> Tensor:
    """Which slots were put to the proxy: [R, K] bool, True = proposed.

    The emitted slot of an unforced row was accepted; every other proposed slot was rejected.
    Rows with a single candidate are marked too, although no coin decided them.
    """
    ranks = times.argsort(-1).argsort(-1)
    return ranks < decision.num_proposed.unsqueeze(-1)
