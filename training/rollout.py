"""Sample responses from the frozen LLM with the proxy deciding every token, and record its decisions.

The server's hook and this loop call the same accept/reject sampling (`proxy.acceptance`) on the same kind of tensors,
processed logits and the lm_head's input, with the same noise for the same seed. One forward of the LLM per emitted
token, however many candidates are rejected.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from proxy.acceptance import Candidates, Decision
from proxy.exact import divergence
from proxy.noise import noise_key, seeded_noise
from training.console import TrainingError
from training.model_inputs import HeadInput, pad_left
from training.models import context_of
from training.policy import Decoding, DrawNoise, Policy, Proposals


class Decisions(NamedTuple):
    """D decisions of the proxy, each on one candidate.

    Ordered by response and position; at a position the most probable candidate comes first. Positions with a single
    candidate need no decision and are left out.
    """

    hidden: Tensor  # [D, H] the lm_head's input at the position
    token_ids: Tensor  # [D] the candidate
    logprobs: Tensor  # [D] its log-probability, renormalised over the nucleus
    accepted: Tensor  # [D] bool
    episodes: Tensor  # [D] index of the response


class Counts(NamedTuple):
    """Totals over all responses."""

    tokens: int
    proposed: int
    rejected: int
    forced: int


class Rollout(NamedTuple):
    """N responses and how they were sampled."""

    responses: list[list[int]]  # token ids, with the end of the turn if it was reached
    decisions: Decisions
    counts: Counts
    kl: Tensor | None  # [N] nats, KL(proxied ‖ frozen) summed over positions, if measured


def longest_prompt(model: PreTrainedModel | PretrainedConfig, decoding: Decoding) -> int:
    """The longest prompt that leaves room for a response in the LLM's context, in tokens.

    Raises:
        TrainingError: a response alone may exceed the context.
    """
    limit = context_of(model) - decoding.max_new_tokens
    if limit <= 0:
        raise TrainingError(
            f"a response of max_new_tokens = {decoding.max_new_tokens} leaves no room for a prompt: "
            f"the model reads {context_of(model)} tokens"
        )
    return limit


def generate(
    policy: Policy,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    end_ids: Collection[int],
    seeds: Iterable[int],
    measure_kl: bool = False,
    batch_size: int | None = None,
) -> Rollout:
    """One response to each prompt.

    Args:
        prompts: N token-id lists, up to the start of the assistant's turn.
        end_ids: tokens that end a response.
        seeds: one for each prompt, as in a request to the server; further ones are not read.
        measure_kl: compute the exact divergence at every position; takes longer than sampling.
        batch_size: responses at once in the device's memory, None = all. It changes only rounding.

    Raises:
        TrainingError: a prompt leaves no room for its response, or the LLM lacks parts that this needs.
    """
    longest, limit = max(map(len, prompts)), longest_prompt(policy.model, decoding)
    if longest > limit:
        raise TrainingError(
            f"a prompt of {longest} tokens and a response of max_new_tokens = {decoding.max_new_tokens} are longer "
            f"than the {context_of(policy.model)} tokens that the model reads"
        )
    size, seeds = batch_size or len(prompts), iter(seeds)
    return joined(
        [
            _generate_batch(
                policy, prompts[start : start + size], decoding, end_ids, seeds, measure_kl
            )
            for start in range(0, len(prompts), size)
        ]
    )


def joined(parts: list[Rollout]) -> Rollout:
    """Concatenate rollouts."""
    first, decisions = 0, []
    for part in parts:
        decisions.append(part.decisions._replace(episodes=part.decisions.episodes + first))
        first += len(part.responses)
    return Rollout(
        [response for part in parts for response in part.responses],
        Decisions(*(torch.cat(columns) for columns in zip(*decisions, strict=True))),
        Counts(*(sum(column) for column in zip(*(part.counts for part in parts), strict=True))),
        torch.cat([part.kl for part in parts if part.kl is not None])
        if parts[0].kl is not None
        else None,
    )


@torch.inference_mode()
def _generate_batch(
    policy: Policy,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    end_ids: Collection[int],
    seeds: Iterator[int],
    measure_kl: bool,
) -> Rollout:
    """`generate` for one batch."""
    model, device = policy.model, policy.model.device
    count = len(prompts)
    keys = torch.tensor([noise_key(seed) for seed in islice(seeds, count)], device=device)
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
    ids, attention, positions = pad_left(prompts, device).values()
    cache = None
    alive = torch.ones(count, dtype=torch.bool, device=device)
    emitted, records = [], _Records(count, device, measure_kl)

    def draw(token_ids: Tensor) -> Tensor:
        return seeded_noise(keys, positions[:, -1] + 1, token_ids)

    with HeadInput(model) as head:
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
    draw: DrawNoise,
    alive: Tensor,  # [N] bool, False = the response has ended
    records: "_Records",
) -> Decision:
    """One position of every response: nucleus, accept logits, decision, record."""
    candidates = policy.candidates(logits, decoding)
    accept_logits = policy.accept_logits(hidden, candidates)
    decision, proposals = policy.decide(candidates, accept_logits, draw, decoding)
    records.add(hidden, candidates, decision, proposals, alive)
    if records.kl is not None:
        alive_candidates = Candidates(*(tensor[alive] for tensor in candidates))
        emission = policy.emission(alive_candidates, accept_logits[alive], decoding)
        kl = divergence(emission, policy.frozen(alive_candidates, decoding))
        records.kl[alive] += kl.float()
    return decision


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
        proposals: Proposals,
        alive: Tensor,
    ) -> None:
        rejected = decision.num_proposed - (~decision.forced).long()
        counts = torch.stack(
            [torch.ones_like(rejected), decision.num_proposed, rejected, decision.forced.long()]
        )
        self._counts += (counts * alive).sum(-1)
        is_choice = alive & ((candidates.logprobs > -torch.inf).sum(-1) > 1)
        kept = is_choice[proposals.rows]
        rows, slots, accepted = (column[kept] for column in proposals)
        self._parts.append(
            Decisions(
                hidden[rows],
                candidates.token_ids[rows, slots],
                candidates.logprobs[rows, slots],
                accepted,
                self._episodes[rows],
            )
        )

    def rollout(self, responses: list[list[int]]) -> Rollout:
        decisions = Decisions(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))
        order = decisions.episodes.argsort(stable=True)
        decisions = Decisions(*(column[order] for column in decisions))
        return Rollout(responses, decisions, Counts(*self._counts.tolist()), self.kl)
