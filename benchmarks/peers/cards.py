"""CARDS (Li, Wang, Lochab, Grama, Zhang: Cascade Reward Sampling, arXiv 2406.16306).

A response grows by segments. A segment ends where the next token's entropy reaches a threshold; it is accepted with
probability min(1, exp((r − τ) / β)), where r is the reward of the response so far and τ rises linearly with its length
from r₀ to a goal r*; else it is drawn again, up to a limit, after which the best of its draws is taken.

r₀ = (1 − α) r(x) + α r*. In the paper r(x) is the reward of the prompt alone; not every reward reads one, so here it is
the mean reward of answers. The paper sets entropy and goal by hand for its models; here they are percentiles (`Scale`).
"""

from collections.abc import Sequence

import torch

from benchmarks.peers.decoders import (
    Decode,
    Generation,
    Lab,
    Reader,
    Responses,
    draw,
    sampler,
)
from training.prompts import Prompt, samples_of

SHORTEST, LONGEST = 4, 64
"""Tokens of a segment."""
MOST_DRAWS = 20


def cards(lab: Lab, *, alpha: float = 0.5, beta: float = 0.3) -> Decode:
    """
    Args:
        alpha: where the threshold starts: 0 = at the mean reward, 1 = at the goal.
        beta: softness of the acceptance, in standard deviations of the reward.
    """
    limit, goal = lab.decoding.max_new_tokens, lab.scale.goal

    @torch.inference_mode()
    def decode(prompts: Sequence[Prompt], seed: int) -> Generation:
        generator = torch.Generator().manual_seed(seed)
        responses = Responses(len(prompts), lab.frozen.end_ids, limit)
        draws: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]  # of the open segment
        passes = scored = 0
        while rows := responses.growing:
            owners = [prompts[i] for i in rows]
            drawn, used = _segments(lab, responses, rows, owners, generator)
            rewards = lab.score(samples_of(lab.frozen.tokenizer, owners, drawn)).tolist()
            uniforms = torch.rand(len(rows), generator=generator).tolist()
            for i, candidate, reward, uniform in zip(rows, drawn, rewards, uniforms, strict=True):
                draws[i].append((reward, candidate))
                threshold = goal * (alpha + (1 - alpha) * min(1.0, len(candidate) / limit))
                probability = torch.tensor((reward - threshold) / beta).exp().item()
                if uniform < probability or len(draws[i]) == MOST_DRAWS:
                    best = candidate if uniform < probability else max(draws[i])[1]
                    responses.tokens[i], draws[i] = best, []
            passes += used
            scored += len(rows)
        return Generation(responses.tokens, passes, scored * lab.passes_of_reward)

    return decode


def _segments(
    lab: Lab,
    responses: Responses,
    rows: Sequence[int],
    owners: Sequence[Prompt],
    generator: torch.Generator,
) -> tuple[list[list[int]], int]:
    """The responses of the rows, each with another segment, and the LLM's passes."""
    candidates_of = sampler(lab)
    grown = [[*responses.tokens[i]] for i in rows]
    reader = Reader(
        lab.frozen.model, [p.ids + tokens for p, tokens in zip(owners, grown, strict=True)]
    )
    open_rows, passes = set(range(len(rows))), 0
    for length in range(LONGEST):
        logits = reader.logits()
        passes += len(open_rows)
        if length >= SHORTEST:
            logprobs = logits.log_softmax(-1)
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            open_rows -= {row for row in open_rows if entropies[row] >= lab.scale.entropy}
        if not open_rows:
            break
        tokens = draw(candidates_of(logits), generator)
        for row in sorted(open_rows):
            grown[row].append(int(tokens[row]))
            if responses.is_finished(grown[row]):
                open_rows.remove(row)
        if not open_rows:
            break
        reader.append(tokens)
    return grown, passes
