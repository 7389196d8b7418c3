"""References that share no code with what they test: nucleus, network and distribution in plain double precision.

Counts are compared with a distribution outcome by outcome: an exact binomial test each, Bonferroni-corrected over
all comparisons of a test, so that a whole test raises a false alarm with probability below 1e-6.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from proxy.network import ProxyNetwork

FALSE_ALARM = 1e-6

Outcome = tuple[int, int, bool]  # emitted slot (or token id), number proposed, forced


class AmbiguousError(Exception):
    """Ties, or a number on the edge: more than one outcome would be correct."""


class Setting(NamedTuple):
    """How one row is sampled."""

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    strength: float = 1.0
    max_rejections: int = 8
    max_candidates: int = 16
    # What the proxy was trained with: greedy rows have these top-k and top-p.
    trained_temperature: float = 1.0
    trained_top_k: int = 0
    trained_top_p: float = 1.0


def enumerate_outcomes(
    p: Sequence[float], a: Sequence[float], max_rejections: int
) -> dict[Outcome, float]:
    """The probability of every outcome, over all orders and acceptances. p, a: [K] probabilities.

    Round by round; orders that have rejected the same candidates are merged. For up to about 16
    candidates: the rejected ones may be any subset of them.
    """
    nucleus = frozenset(slot for slot, prob in enumerate(p) if prob > 0)
    if len(nucleus) == 1 and max_rejections > 0:
        return {(min(nucleus), 1, False): 1.0}
    distribution: dict[Outcome, float] = defaultdict(float)
    pending = {nucleus: 1.0}  # remaining candidates -> probability
    for proposed in range(max_rejections):
        rejected: dict[frozenset[int], float] = defaultdict(float)
        for remaining, weight in pending.items():
            total = sum(p[slot] for slot in remaining)
            for slot in remaining:
                probability = weight * p[slot] / total
                distribution[slot, proposed + 1, False] += probability * a[slot]
                if a[slot] < 1:
                    rejected[remaining - {slot}] += probability * (1 - a[slot])
        exhausted = rejected.pop(frozenset(), None)
        if exhausted is not None:
            distribution[0, proposed + 1, True] += exhausted
        pending = rejected
    for weight in pending.values():
        distribution[0, max_rejections, True] += weight
    return dict(distribution)


def greedy_outcome(p: Sequence[float], a: Sequence[float], max_rejections: int) -> Outcome:
    """The outcome of a greedy row: the candidate of the largest p a among the first `max_rejections`."""
    if max_rejections == 0:
        return 0, 0, True
    scores = [x * y for x, y in zip(p, a, strict=True)][:max_rejections] if len(p) > 1 else [1.0]
    best = scores.index(max(scores))
    if any(x > scores[best] * (1 - 1e-4) for slot, x in enumerate(scores) if slot != best):
        raise AmbiguousError
    return best, best + 1, False


def sample_by_loop(
    p: Sequence[float], a: Sequence[float], max_rejections: int, rng: np.random.Generator
) -> Outcome:
    """The paper's loop: draw from the rest of the nucleus, ask the proxy, remove what it rejects, repeat."""
    remaining = {slot: prob for slot, prob in enumerate(p) if prob > 0}
    if len(remaining) == 1 and max_rejections > 0:
        return next(iter(remaining)), 1, False
    proposed = 0
    while remaining and proposed < max_rejections:
        weights = np.array(list(remaining.values()))
        slot = int(rng.choice(list(remaining), p=weights / weights.sum()))
        proposed += 1
        if rng.random() < a[slot]:
            return slot, proposed, False
        del remaining[slot]
    return 0, proposed, True


def sorted_nucleus(logits: np.ndarray, setting: Setting) -> tuple[list[int], list[float]]:
    """Candidates of logits [V] by full sorts: token ids, the most probable first, and probabilities.

    As `proxy.acceptance.nucleus` documents it, min-p before all: tokens that tie with the k-th are
    kept, and with K < top_k the mass is counted over all tokens.

    Raises:
        AmbiguousError: the sort decides which of several tied tokens is inside, a greedy row has
            ties, or a token is on the edge of min-p or top-p.
    """
    is_greedy = setting.temperature == 0
    if is_greedy:
        limits = {"top_k": setting.trained_top_k, "top_p": setting.trained_top_p, "min_p": 0.0}
        setting = setting._replace(**limits)
    else:  # never wider than that of the training
        top_ks = [k for k in (setting.top_k, setting.trained_top_k) if k]
        top_p = min(setting.top_p, setting.trained_top_p)
        setting = setting._replace(top_k=min(top_ks, default=0), top_p=top_p)
    scaled = logits.astype(np.float64) / setting.trained_temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    order = order[np.isfinite(scaled[order])]
    if np.isclose(probs[order], setting.min_p, rtol=1e-4, atol=0).any():
        raise AmbiguousError
    order = order[probs[order] >= setting.min_p]
    mass = probs[order].sum()
    if 0 < setting.top_k <= setting.max_candidates:
        kth_logit = scaled[order[: setting.top_k]][-1]
        order = _cut(order[scaled[order] >= kth_logit], setting.max_candidates, scaled)
        mass = probs[order].sum()
    if setting.top_p < 1:
        mass_before = (np.cumsum(probs[order]) - probs[order]) / mass
        if np.isclose(mass_before[1:], setting.top_p, atol=1e-4).any():
            raise AmbiguousError
        order = _cut(order, max(1, int((mass_before < setting.top_p).sum())), scaled)
    order = _cut(order, setting.max_candidates, scaled)
    if is_greedy and len({*scaled[order]}) < len(order):
        raise AmbiguousError
    return order.tolist(), (probs[order] / probs[order].sum()).tolist()


def _cut(order: np.ndarray, size: int, scaled: np.ndarray) -> np.ndarray:
    if size < len(order) and scaled[order[size - 1]] == scaled[order[size]]:
        raise AmbiguousError
    return order[:size]


def token_distribution(
    logits: np.ndarray,  # [V]
    setting: Setting,
    accept_logits: Callable[[list[int], list[float]], Sequence[float]],
) -> dict[Outcome, float]:
    """The distribution of one row, by token id.

    Args:
        accept_logits: of these token ids with these logprobs.
    """
    token_ids, p = sorted_nucleus(logits, setting)
    scores = accept_logits(token_ids, [math.log(x) for x in p])
    a = [math.exp(-setting.strength * _softplus(-score)) for score in scores]
    if setting.temperature == 0:
        distribution = {greedy_outcome(p, a, setting.max_rejections): 1.0}
    else:
        powers = [x ** (setting.trained_temperature / setting.temperature) for x in p]
        distribution = enumerate_outcomes(
            [x / sum(powers) for x in powers], a, setting.max_rejections
        )
    return {
        (token_ids[slot], proposed, forced): prob
        for (slot, proposed, forced), prob in distribution.items()
    }


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def canonical(outcome: Outcome, logits: np.ndarray) -> Outcome:
    """Any of several most probable tokens may be forced: it is replaced by the first."""
    token_id, proposed, forced = outcome
    best = int(logits.argmax())
    if forced and logits[token_id] == logits[best]:
        token_id = best
    return token_id, proposed, forced


def with_ties(logits: Tensor) -> Tensor:
    """Logits [R, V] with the second made equal to the best and the fourth to the third, in every row.

    Ties of a model's own bf16 logits depend on the processor's rounding.
    """
    order = logits.topk(4).indices
    return logits.scatter(-1, order[:, 1::2], logits.gather(-1, order[:, ::2]))


def accept_logits_of(
    network: ProxyNetwork,
    hidden: Tensor,  # [H]
    embeddings: Tensor,  # [V, H]
    token_ids: list[int],
    logprobs: list[float],
) -> list[float]:
    """The network's formula in double precision, as in its module's docstring, without a table."""
    w = {name: p.detach().double() for name, p in network.named_parameters()}

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    u = w["state_half.weight"] @ rms(hidden.double())
    scores = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        c = w["candidate_half.weight"] @ rms(embeddings[token_id].double())
        x = torch.cat((u + c, u * c, torch.tensor([max(logprob, -20.0) / 5]).double()))
        y = w["mix.weight"] @ x[: w["mix.weight"].shape[1]] + w["mix.bias"]
        y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
        scores.append((w["score.weight"][0] @ y + w["score.bias"][0]).item())
    return scores


def assert_follows(
    counts: Counter[Outcome], distribution: dict[Outcome, float], tests: int = 1
) -> None:
    """`counts` are draws from `distribution`; `tests` = how many such comparisons the test makes."""
    p_value = least_p_value(counts, distribution)
    assert p_value > FALSE_ALARM / tests, (p_value, counts, distribution)


def least_p_value(counts: Counter[Outcome], distribution: dict[Outcome, float]) -> float:
    """Below x with probability at most x if the counts are draws from this distribution.

    Each outcome is tested, and each token over all its outcomes.
    """
    if any(distribution.get(outcome, 0.0) < 1e-30 for outcome in counts):
        return 0.0
    tokens: Counter[int] = Counter()
    token_distribution: dict[int, float] = defaultdict(float)
    for outcome, probability in distribution.items():
        tokens[outcome[0]] += counts[outcome]
        token_distribution[outcome[0]] += probability
    pairs = [(counts[outcome], probability) for outcome, probability in distribution.items()]
    pairs += [(tokens[token], probability) for token, probability in token_distribution.items()]
    total = counts.total()
    values = [binomtest(count, total, min(prob, 1.0)).pvalue for count, prob in pairs]
    return min(1.0, min(values) * len(pairs))
