"""The sampling policy: the frozen LLM under a decoding, with or without a proxy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from judge.options import NonNegative, PositiveShare
from proxy.acceptance import (
    Candidates,
    Decision,
    arrival_times,
    decide,
    narrower_top_k,
    nucleus,
    proposed_mask,
    uniform_nucleus,
)
from proxy.exact import emission_probabilities, sharpened
from proxy.network import MAX_CANDIDATES, ProxyConfig, ProxyNetwork, score_single

_MAX_TIES = 16  # candidates tied with the k-th one, all of which vLLM keeps


@dataclass(frozen=True)
class Decoding:
    """How tokens are sampled. The nucleus is the set that the proxy may choose from."""

    temperature: NonNegative = 1.0
    """0 = greedy. If a proxy was trained at another temperature, the nucleus is that of its training."""
    top_k: NonNegativeInt = 16
    """Candidates considered; 0 = all."""
    top_p: PositiveShare = 0.95
    """Probability mass of the nucleus."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens in a response."""


class Proposals(NamedTuple):
    """The candidates that the proxy decided at one position of R responses: P of them."""

    rows: Tensor  # [P] into R
    slots: Tensor  # [P] into K
    accepted: Tensor  # [P] bool


DrawNoise = Callable[[Tensor], Tensor]
"""Candidates [R, K] -> standard exponential noise [R, 2, K]."""


class Policy:
    """A frozen LLM with a proxy. Without a network, or at strength 0: the LLM alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        network: ProxyNetwork | None = None,
        strength: float = 1.0,
    ) -> None:
        if strength == 0:
            network = None
        self.model = model
        self.network = network
        self.strength = strength if network else 0.0
        self.config = network.config if network else default_config(model)
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            self._table = network.candidate_table(embeddings) if network else None
            self._weights = network.weights() if network else None

    def candidates(self, logits: Tensor, decoding: Decoding) -> Candidates:
        """The nucleus of [N, V] logits: at most the proxy's K candidates; without a proxy all that `decoding` leaves.

        A proxy's nucleus is that of the temperature it was trained at. As in vLLM, greedy rows have no top-k and no
        top-p of their own: a proxy uses those of its training. Other values never widen the nucleus.
        """
        rows, vocab_size = logits.shape
        is_greedy, temperature = decoding.temperature == 0, decoding.temperature
        top_k, top_p = decoding.top_k, decoding.top_p
        if self.network is not None:
            temperature = self.config.temperature
            if is_greedy:
                top_k, top_p = self.config.top_k, self.config.top_p
            else:
                top_k, top_p = (
                    narrower_top_k(top_k, self.config.top_k),
                    min(top_p, self.config.top_p),
                )
        elif is_greedy:
            return nucleus(logits, 1)
        elif not top_k and top_p == 1:
            # The order of the candidates does not matter here.
            tokens = torch.arange(vocab_size, device=logits.device).expand(rows, -1)
            return Candidates(tokens, (logits.float() / temperature).log_softmax(-1))
        most = self.config.max_candidates if self.network else (top_k or vocab_size) + _MAX_TIES
        return uniform_nucleus(logits, temperature, top_k, top_p, most)

    def sharpness(self, decoding: Decoding) -> float:
        """The exponent of the nucleus' probabilities in the proposal distribution; inf = greedy."""
        if self.network is None:
            return 1.0
        return self.config.temperature / decoding.temperature if decoding.temperature else math.inf

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[R, K]; zeros without a network, where the strength is 0 and they have no effect."""
        if self._weights is None or self._table is None:
            return torch.zeros_like(candidates.logprobs)
        table_rows = self._table[candidates.token_ids]
        return score_single(self._weights, hidden, table_rows, candidates.logprobs)

    def decide(
        self,
        candidates: Candidates,
        accept_logits: Tensor,  # [R, K]
        draw: DrawNoise,
        decoding: Decoding,
    ) -> tuple[Decision, Proposals]:
        """Accept/reject sampling, and the proposals on the way."""
        rows, device = len(accept_logits), accept_logits.device
        noise = draw(candidates.token_ids)
        is_greedy = decoding.temperature == 0
        greedy = torch.full((rows,), is_greedy, device=device)
        power = 1.0 if is_greedy else self.sharpness(decoding)
        sharpness = torch.full((rows,), power, device=device)
        decision = decide(
            candidates,
            accept_logits,
            noise,
            strength=torch.full((rows,), self.strength, device=device),
            max_rejections=torch.full((rows,), self.config.max_rejections, device=device),
            sharpness=sharpness,
            greedy=greedy,
        )
        if self.network is None:  # no proxy, no proposals
            nothing = torch.empty(0, dtype=torch.long, device=device)
            return decision, Proposals(nothing, nothing, nothing.bool())
        times = arrival_times(candidates, noise[:, 0], sharpness=sharpness, greedy=greedy)
        proposed = proposed_mask(times, decision)
        of, slots = torch.nonzero(proposed, as_tuple=True)
        return decision, Proposals(of, slots, (slots == decision.slots[of]) & ~decision.forced[of])

    def frozen(self, candidates: Candidates, decoding: Decoding) -> Candidates:
        """The LLM's own distribution within the same nucleus."""
        return sharpened(candidates, self.sharpness(decoding))

    def emission(self, candidates: Candidates, accept_logits: Tensor, decoding: Decoding) -> Tensor:
        """P(the token of each slot is emitted), in closed form: [R, K] float64."""
        if self.network is None:
            return candidates.logprobs.double().exp()
        return emission_probabilities(
            candidates,
            accept_logits,
            strength=self.strength,
            max_rejections=self.config.max_rejections,
            sharpness=self.sharpness(decoding),
        )


def default_config(model: PreTrainedModel, **settings: Any) -> ProxyConfig:
    """A proxy's configuration for this LLM."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    return ProxyConfig(hidden_size=hidden_size, vocab_size=vocab_size, **settings)


def accepting_network(model: PreTrainedModel, decoding: Decoding) -> ProxyNetwork | None:
    """A proxy that accepts every candidate, so that its samples are the frozen LLM's.

    None = it would need too many candidates, or the decoding is greedy.
    """
    max_candidates = decoding.top_k + _MAX_TIES
    if not decoding.temperature or not decoding.top_k or max_candidates > MAX_CANDIDATES:
        return None
    decoded = {name: getattr(decoding, name) for name in ("temperature", "top_k", "top_p")}
    config = default_config(model, width=2, max_candidates=max_candidates, **decoded)
    with torch.random.fork_rng():
        network = ProxyNetwork(config)
    torch.nn.init.zeros_(network.score.weight)
    torch.nn.init.constant_(network.score.bias, 100.0)  # its sigmoid is 1
    return network
