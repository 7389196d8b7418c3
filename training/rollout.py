"""Sample responses from the frozen LLM with the proxy deciding every token, and record its decisions.

The server's hook and this loop call the same law (`proxy.acceptance`) on the same kind of tensors: processed logits and
the lm_head's input, and draw the same noise for the same seed. One forward of the LLM per emitted token, however many
candidates are rejected.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxy.acceptance import (
    Candidates,
    Decision,
    decide,
    noise_key,
    nucleus,
    proposal_times,
    proposed_mask,
    seeded_noise,
)
from proxy.exact import divergence, emission_probabilities
from proxy.network import ProxyConfig, ProxyNetwork, score_alone


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The nucleus is all that the proxy may choose from."""

    temperature: float = 1.0
    """0 = greedy."""
    top_k: int = 16
    """Candidates considered; 0 = all."""
    top_p: float = 0.95
    """Probability mass considered."""
    max_new_tokens: int = 64
    """A response is cut after this many tokens."""


class Decisions(NamedTuple):
    """What the proxy was asked and answered: D decisions, each a candidate accepted or rejected.

    Response by response and position by position; at a position the most probable candidate comes first. Positions with
    a single candidate ask nothing and are not here.
    """

    hidden: Tensor  # [D, H] the lm_head's input at the position
    token_ids: Tensor  # [D] the candidate
    logprobs: Tensor  # [D] its log-probability, renormalised over the nucleus
    accepted: Tensor  # [D] bool
    episodes: Tensor  # [D] index of the response


class Counts(NamedTuple):
    """Over all responses."""

    tokens: int
    proposed: int
    rejected: int
    forced: int


class Rollout(NamedTuple):
    """N responses and how they came about."""

    responses: list[list[int]]  # token ids, end of turn included where it was reached
    decisions: Decisions
    counts: Counts
    kl: Tensor | None  # [N] nats, KL(proxied ‖ frozen) summed over positions, if measured


class Policy:
    """A proxy beside a frozen LLM; without a network every first candidate is accepted."""

    def __init__(
        self,
        model: PreTrainedModel,
        network: ProxyNetwork | None = None,
        strength: float = 1.0,
    ) -> None:
        self.model = model
        self.network = network
        self.strength = strength if network else 0.0
        self.config = network.config if network else default_config(model)
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            self._table = network.candidate_table(embeddings) if network else None
            self._weights = network.weights() if network else None

    def accept_logits(self, hidden: Tensor, candidates: Candidates) -> Tensor:
        """[R, K]; without a network the strength is 0, and they do not matter."""
        if self._weights is None or self._table is None:
            return torch.zeros_like(candidates.logprobs)
        table_rows = self._table[candidates.token_ids]
        return score_alone(self._weights, hidden, table_rows, candidates.logprobs)


def default_config(model: PreTrainedModel, **settings: Any) -> ProxyConfig:
    """A proxy's configuration for this LLM."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    return ProxyConfig(hidden_size=hidden_size, vocab_size=vocab_size, **settings)


@torch.inference_mode()
def generate(
    policy: Policy,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    end_ids: Collection[int],
    seeds: Iterable[int],
    measure_kl: bool = False,
) -> Rollout:
    """One response to each prompt.

    Args:
        prompts: N token-id lists, up to where the assistant begins to speak.
        end_ids: tokens that end a response.
        seeds: one for each prompt, as a request to the server has one; more are not looked at.
        measure_kl: compute the exact divergence at every position too; takes longer than sampling does.
    """
    model, device = policy.model, policy.model.device
    count, width = len(prompts), max(map(len, prompts))
    keys = torch.tensor([noise_key(seed) for seed in islice(seeds, count)], device=device)
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
    ids = torch.zeros(count, width, dtype=torch.long, device=device)
    attention = torch.zeros(count, width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        attention[row, width - len(prompt) :] = 1
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    cache = None
    alive = torch.ones(count, dtype=torch.bool, device=device)
    emitted, records = [], _Records(count, device, measure_kl)

    def draw(token_ids: Tensor) -> Tensor:
        return seeded_noise(keys, positions[:, -1] + 1, token_ids)

    with _HeadInput(model) as head:
        for _ in range(decoding.max_new_tokens):
            output = model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            decision = _step(
                policy, output.logits[:, -1], head.rows, decoding, draw, alive, records
            )
            tokens = torch.where(alive, decision.token_ids, 0)
            emitted.append(torch.where(alive, tokens, -1))
            alive = alive & ~torch.isin(tokens, ends)
            if not alive.any():
                break
            ids, positions = tokens.unsqueeze(-1), positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(count, 1)], dim=-1)
    responses = [[t for t in row if t >= 0] for row in torch.stack(emitted, -1).tolist()]
    return records.rollout(responses)


def _step(
    policy: Policy,
    logits: Tensor,  # [N, V]
    hidden: Tensor,  # [N, H]
    decoding: Decoding,
    draw: Callable[[Tensor], Tensor],  # candidates [N, K] -> standard exponentials [N, 2, K]
    alive: Tensor,  # [N] bool, False = the response has ended
    records: "_Records",
) -> Decision:
    """One position of every response: nucleus, accept logits, decision, record."""
    rows, device = logits.shape[0], logits.device
    is_greedy = decoding.temperature == 0
    logits = logits.float() / (1.0 if is_greedy else decoding.temperature)
    candidates = _candidates(logits, policy.config.max_candidates, decoding)
    accept_logits = policy.accept_logits(hidden, candidates)
    noise = draw(candidates.token_ids)
    greedy = torch.full((rows,), is_greedy, device=device)
    strength = torch.full((rows,), policy.strength, device=device)
    max_rejections = torch.full((rows,), policy.config.max_rejections, device=device)
    decision = decide(
        candidates,
        accept_logits,
        noise,
        strength=strength,
        max_rejections=max_rejections,
        greedy=greedy,
    )
    proposed = proposed_mask(proposal_times(candidates, noise[:, 0], greedy), decision)
    records.add(hidden, candidates, decision, proposed, alive)
    if records.kl is not None:
        kl = torch.zeros(rows, device=device)
        kl[alive] = _divergence(policy, candidates, accept_logits, alive)
        records.kl += kl
    return decision


def _candidates(logits: Tensor, max_candidates: int, decoding: Decoding) -> Candidates:
    """The nucleus of [N, V] logits; as in vLLM, greedy rows have no top-k and no top-p."""
    if decoding.temperature == 0:
        return nucleus(logits, max_candidates)
    rows, vocab_size = logits.shape
    top_k = torch.full((rows,), decoding.top_k or vocab_size, device=logits.device)
    top_p = torch.full((rows,), decoding.top_p, device=logits.device)
    return nucleus(logits, max_candidates, top_k, top_p)


def _divergence(
    policy: Policy, candidates: Candidates, accept_logits: Tensor, chosen: Tensor
) -> Tensor:
    """KL(proxied ‖ frozen) of the chosen rows, in nats."""
    some = Candidates(*(tensor[chosen] for tensor in candidates))
    probabilities = emission_probabilities(
        some,
        accept_logits[chosen],
        strength=policy.strength,
        max_rejections=policy.config.max_rejections,
    )
    return divergence(probabilities, some).float()


class _HeadInput:
    """Taps what goes into the lm_head, whatever the architecture does to the logits afterwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._head = model.get_output_embeddings()

    def __enter__(self) -> "_HeadInput":
        self._handle = self._head.register_forward_pre_hook(self._tap)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _tap(self, module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Of rows that lie apart torch would make a batch, with a copy of the head's weights for each.
        last = inputs[0][:, -1:].contiguous()
        self.rows = last[:, 0]  # [N, H]
        return (last,)


class _Records:
    """Collects decisions and counts, position by position."""

    def __init__(self, count: int, device: torch.device, measure_kl: bool) -> None:
        self._parts: list[Decisions] = []
        self._counts = torch.zeros(4, dtype=torch.long, device=device)
        self.kl = torch.zeros(count, device=device) if measure_kl else None
        self._episodes = torch.arange(count, device=device)

    def add(
        self,
        hidden: Tensor,
        candidates: Candidates,
        decision: Decision,
        proposed: Tensor,
        alive: Tensor,
    ) -> None:
        rejected = decision.num_proposed - (~decision.forced).long()
        counts = torch.stack(
            [torch.ones_like(rejected), decision.num_proposed, rejected, decision.forced.long()]
        )
        self._counts += (counts * alive).sum(-1)
        is_choice = (candidates.logprobs > -torch.inf).sum(-1) > 1
        rows, slots = torch.nonzero(proposed & (alive & is_choice).unsqueeze(-1), as_tuple=True)
        self._parts.append(
            Decisions(
                hidden[rows],
                candidates.token_ids[rows, slots],
                candidates.logprobs[rows, slots],
                (slots == decision.slots[rows]) & ~decision.forced[rows],
                self._episodes[rows],
            )
        )

    def rollout(self, responses: list[list[int]]) -> Rollout:
        decisions = Decisions(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))
        order = decisions.episodes.argsort(stable=True)
        decisions = Decisions(*(column[order] for column in decisions))
        return Rollout(responses, decisions, Counts(*self._counts.tolist()), self.kl)
