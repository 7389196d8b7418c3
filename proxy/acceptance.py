"""Accept/reject sampling: logits and a proxy's scores in, one token per row out (arXiv 2403.04283).

The paper's loop, at one position: the LLM proposes a token drawn from its nucleus, and the proxy
accepts or rejects it. A rejected token is not proposed again at this position. When the nucleus is
exhausted, or after `max_rejections` rejections, the LLM's most probable token is taken: it is forced.

The same distribution without a loop. An exponential race with rates p orders the candidates like
draws from the renormalised nucleus without replacement: each candidate arrives at a random time, and
candidates are proposed in the order of arrival. Independent noise for each candidate decides whether
the proxy accepts it. The first accepted candidate in that order is emitted. This takes one LLM forward
pass per emitted token instead of one per candidate. `decide` does all of it; the server's samplers and
the trainer's rollout call it.

Several proxies. Each decides on its own whether it accepts a candidate, which is accepted if all of
them accept it: with the product of their probabilities, Π a_i^strength_i. So the costs -log a_i^strength_i
add up, and everything else is as with one proxy.

Temperature. A proxy is trained at one temperature T0 and may be used at any T. The nucleus, and so p
and the proxy's input, is always that of T0. Candidates are proposed by p^(T0 / T) and accepted with
probability a^strength: temperature sharpens the proposals, strength the acceptance. At T = 0 nothing
is random: the candidate of largest log p + strength log a is taken.

R = logits rows, V = vocabulary, K = candidates, P = proxies of a row. Nothing here waits for the device.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNDERFLOW = math.log(torch.finfo(torch.float32).tiny)  # -87.3

_SPARE = 16  # candidates beyond those asked for, so that ties at the end are complete


class Candidates(NamedTuple):
    """The tokens that the LLM may emit at each of R positions, the most probable first."""

    token_ids: Tensor  # [R, K] int64
    logprobs: Tensor  # [R, K] float32, natural log, renormalised; -inf = outside the nucleus


@dataclass(frozen=True)
class Decision:
    """The emitted token at each of R positions, and how it was decided."""

    columns: (
        Tensor  # [4, R] int64, the four below: a step keeps and copies one tensor instead of four
    )

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
        """[R] candidates proposed to the proxy, the accepted one included."""
        return self.columns[2]

    @property
    def forced(self) -> Tensor:
        """[R] bool, no candidate was accepted: the most probable one was emitted."""
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

    With a proxy, `temperature` is that of its training, whatever the request asks for.

    As in vLLM, top-p counts probabilities renormalised after top-k and keeps a token while the mass
    before it is below p; tokens that tie with the k-th are all kept, up to K. The most probable token
    is always kept. Tokens whose probability underflows are dropped: the LLM would never emit them,
    but a proxy that rejects all others would reach them, and with them the tokens that a logit_bias
    of -100 bans. A row without any allowed token has one candidate, token 0, which vLLM samples there.

    The vocabulary is not sorted: this takes one topk(K), and one logsumexp if there is a top-p. The
    price is one approximation: where K < top_k < V, the mass is that of the whole vocabulary instead
    of the top_k tokens.
    """
    values, token_ids = most_probable(logits, max_candidates)  # [R, K] both
    num_slots = values.shape[-1]
    values = values.float()
    if temperature is not None:
        values = values / temperature.unsqueeze(-1)
    values[:, :1].clamp_(min=torch.finfo(torch.float32).min)  # where nothing is allowed: no NaN
    limit: int | Tensor = num_slots
    if sizes is not None:  # first of all: a row must not depend on the sizes of other rows
        limit = sizes.unsqueeze(-1)
        ranks = torch.arange(num_slots, device=logits.device)
        values = values.masked_fill(ranks >= limit, -math.inf)
    if top_k is not None:
        last = values.gather(-1, (top_k.long() - 1).clamp(0, num_slots - 1).unsqueeze(-1))
        is_inside = (values >= last) | (top_k.unsqueeze(-1) > limit)
        values = values.masked_fill(~is_inside, -math.inf)
    if top_p is not None:
        scaled = logits if temperature is None else logits / temperature.unsqueeze(-1)
        mass = scaled.float().logsumexp(-1, keepdim=True)
        if top_k is not None:
            kept = values.logsumexp(-1, keepdim=True)
            mass = torch.where(top_k.unsqueeze(-1) <= limit, kept, mass)
        probs = (values - mass).exp()
        mass_before = probs.cumsum(-1) - probs
        p = top_p.unsqueeze(-1)
        is_outside = (mass_before >= p) & (p < 1)  # rounding must not let p = 1 remove anything
        is_outside[:, 0] = False
        values = values.masked_fill(is_outside, -math.inf)
    return Candidates(token_ids, F.threshold(values.log_softmax(-1), UNDERFLOW, -math.inf))


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of [R, V] logits, largest first, and their token ids: [R, count] both, or [R, V].

    Of equal logits the token with the smaller id comes first, as in argmax. topk alone orders ties
    depending on its k, so it is asked for a few more and the result is sorted. Where all are -inf,
    token 0 comes first.
    """
    values, token_ids = logits.topk(min(count + _SPARE, logits.shape[-1]), dim=-1)
    token_ids, order = token_ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    token_ids = token_ids.gather(-1, order)
    token_ids[:, :1].masked_fill_(values[:, :1] == -math.inf, 0)
    return values[:, :count], token_ids[:, :count]


def uniform_nucleus(
    logits: Tensor, temperature: float, top_k: int, top_p: float, max_candidates: int
) -> Candidates:
    """`nucleus` of [R, V] logits with the same settings for all rows; top-k 0 = off."""
    rows, vocab_size = logits.shape
    return nucleus(
        logits.float() / temperature,
        min(max_candidates, vocab_size),
        torch.full((rows,), top_k or vocab_size, device=logits.device),
        torch.full((rows,), top_p, device=logits.device),
    )


def narrower_top_k(one: int, other: int) -> int:
    """The smaller of two top-k, where 0 means no limit."""
    return min(one, other) if one and other else one or other


def arrival_times(
    candidates: Candidates,
    race_noise: Tensor,  # [R, K] standard exponentials
    *,
    sharpness: Tensor | None = None,  # [R] float, T0 / T; None = 1 everywhere
    greedy: Tensor | None = None,  # [R] bool; None = no row
) -> Tensor:
    """When each candidate is proposed: [R, K], lower = earlier, +inf = never (not in the nucleus).

    In an exponential race a candidate of rate p^sharpness arrives at noise / p^sharpness, and the
    order of arrival is that of sampling without replacement. The logarithm of the time is returned:
    it gives the same order and cannot overflow. Greedy rows propose by probability: 0, 1, 2...
    """
    rates = candidates.logprobs
    if sharpness is not None:
        rates = rates * sharpness.unsqueeze(-1)
    times = race_noise.log() - rates
    if greedy is None:
        return times
    ranks = torch.arange(times.shape[-1], device=times.device, dtype=times.dtype)
    ranks = ranks.masked_fill(candidates.logprobs == -math.inf, math.inf)
    return torch.where(greedy.unsqueeze(-1), ranks, times)


def accept_costs(
    accept_logits: Tensor,  # [..., K]
    strength: Tensor | None,  # [...] float, >= 0; None = 1 everywhere
) -> Tensor:
    """-log of the probability a^strength that a proxy accepts, with a = sigmoid(accept_logit): [..., K]."""
    costs = F.softplus(-accept_logits)
    return costs if strength is None else costs * strength.unsqueeze(-1)


def joint_cost(costs: Tensor) -> Tensor:
    """-log of the probability that all P proxies accept: [R, P, K] -> [R, K].

    Added up one proxy after the other, so that a row does not depend on another row's number of them.
    """
    total, *others = costs.unbind(1)
    for cost in others:
        total = total + cost
    return total


def accept_mask(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K], or of several proxies [R, P, K]
    accept_noise: Tensor,  # [R, K] standard exponentials
    *,
    strength: Tensor | None,  # [R] or [R, P] float, >= 0; None = 1 everywhere
    max_rejections: Tensor,  # [R] int
    greedy: Tensor | None = None,  # [R] bool; None = no row
) -> Tensor:
    """Whether the proxies accept each candidate when it is proposed: [R, K] bool, True = accept.

    They accept with probability exp(-cost). With exponential noise E this is E >= cost, because
    P(E >= x) = exp(-x). Greedy rows use no noise: the candidate of `greedy_slots` is accepted and no
    other. A row with a single candidate accepts it. Values outside the nucleus are undefined. A proxy
    of strength 0 adds nothing: it fills the place of one that a row does not have.
    """
    cost = accept_costs(accept_logits, strength)
    if cost.dim() == 3:
        cost = joint_cost(cost)
    has_one = (candidates.logprobs[:, 1:] == -math.inf).all(-1, keepdim=True)
    cost = cost.masked_fill(has_one, 0.0)
    accepts = accept_noise >= cost
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

    Only the `max_rejections` most probable candidates are considered. Of equal ones the most
    probable is taken.
    """
    ranks = torch.arange(cost.shape[-1], device=cost.device)
    score = candidates.logprobs - cost
    return score.masked_fill(ranks >= max_rejections.unsqueeze(-1), -math.inf).argmax(-1)


def resolve(
    candidates: Candidates,
    times: Tensor,  # [R, K] from `arrival_times`
    accepts: Tensor,  # [R, K] from `accept_mask`
    max_rejections: Tensor,  # [R] int
) -> Decision:
    """The first accepted candidate of each row, or the most probable one where there is none.

    `max_rejections` = 0 takes the most probable token without the proxy.
    """
    first_time, first_slot = torch.where(accepts, times, math.inf).min(-1)  # [R] both
    num_before = (times < first_time.unsqueeze(-1)).sum(
        -1
    )  # all rejected, as far as they are proposed
    forced = (first_time == math.inf) | (num_before >= max_rejections)
    slots = first_slot.masked_fill(forced, 0)
    token_ids = candidates.token_ids.gather(-1, slots.unsqueeze(-1)).squeeze(-1)
    num_proposed = torch.minimum(num_before + ~forced, max_rejections)
    return Decision(torch.stack((slots, token_ids, num_proposed, forced.long())))


def decide(
    candidates: Candidates,
    accept_logits: Tensor,  # [R, K], or of several proxies [R, P, K]
    noise: Tensor,  # [R, 2, K] from `proxy.noise`
    *,
    strength: Tensor | None,  # [R] or [R, P] float, 0 = accept all, 1 = as trained, more = stricter
    max_rejections: Tensor,  # [R] int
    sharpness: Tensor | None = None,  # [R] float, T0 / T
    greedy: Tensor | None = None,  # [R] bool
) -> Decision:
    """Accept/reject sampling from scores and noise: order of proposal, acceptance, decision.

    None means the same as in the functions above.
    """
    race_noise, accept_noise = noise.unbind(1)
    times = arrival_times(candidates, race_noise, sharpness=sharpness, greedy=greedy)
    accepts = accept_mask(
        candidates,
        accept_logits,
        accept_noise,
        strength=strength,
        max_rejections=max_rejections,
        greedy=greedy,
    )
    return resolve(candidates, times, accepts, max_rejections)


def proposed_mask(times: Tensor, decision: Decision) -> Tensor:
    """Which slots were proposed: [R, K] bool.

    The emitted slot of an unforced row was accepted; every other proposed slot was rejected.
    The slot of a single candidate counts as proposed, although the proxy had no choice.
    """
    ranks = times.argsort(-1).argsort(-1)
    return ranks < decision.num_proposed.unsqueeze(-1)
