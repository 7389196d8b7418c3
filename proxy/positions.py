"""The positions of responses where a proxy has a choice: the data of training from preferences.

A position is kept if its nucleus has several candidates and the response's token is among them. A
proxy has no influence on the others: on a nucleus of one token, and on tokens outside the nucleus.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxy.acceptance import Candidates, uniform_nucleus
from proxy.network import ProxyConfig
from proxy.request import ReadRequest


class Positions(NamedTuple):
    """P positions of N responses, response by response."""

    hidden: Tensor  # [P, H] the lm_head's input, in the LLM's dtype
    token_ids: Tensor  # [P, K] int32, the candidates, the most probable first
    logprobs: Tensor  # [P, K] float32, renormalised over the nucleus; -inf = outside
    slots: Tensor  # [P] int64, which of them the response took
    counts: Tensor  # [N] int64, positions of each response
    tokens: Tensor  # [N] int64, all its tokens
    outside: Tensor  # [N] int64, tokens outside the nucleus

    @property
    def share_outside(self) -> float:
        """The share of tokens that are outside the nucleus."""
        return self.outside.sum().item() / max(1, self.tokens.sum().item())

    def of(self, responses: Tensor) -> tuple["Positions", Tensor]:
        """The positions of some of the responses [n], and which of the n each belongs to: [P']."""
        counts = self.counts[responses]
        starts = (self.counts.cumsum(0) - self.counts)[responses]
        owners = torch.arange(len(responses)).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts)[owners]
        rows = starts[owners] + torch.arange(len(owners)) - first
        of_rows = (self.hidden[rows], self.token_ids[rows], self.logprobs[rows], self.slots[rows])
        return Positions(*of_rows, counts, self.tokens[responses], self.outside[responses]), owners


def joined(parts: Sequence[Positions]) -> Positions:
    """The positions of all parts, concatenated."""
    return Positions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def nucleus_of(logits: Tensor, config: ProxyConfig | ReadRequest) -> Candidates:
    """A proxy's nucleus of [R, V] logits under the decoding that it is trained with."""
    return uniform_nucleus(
        logits, config.temperature, config.top_k, config.top_p, config.max_candidates
    )


def choices(
    hidden: Tensor,  # [R, H] of R tokens of N responses, response by response
    candidates: Candidates,  # of these rows
    targets: Tensor,  # [R] the tokens
    owners: Tensor,  # [R] their responses, into N
    num_responses: int,  # N
) -> Positions:
    """Those of R rows that leave a choice, on the CPU."""
    is_inside_nucleus = candidates.logprobs > -torch.inf
    is_taken = (candidates.token_ids == targets[:, None]) & is_inside_nucleus
    is_inside = is_taken.any(-1)
    kept = is_inside & (is_inside_nucleus.sum(-1) > 1)

    def count(mask: Tensor) -> Tensor:
        return torch.bincount(owners[mask], minlength=num_responses).cpu()

    return Positions(
        hidden[kept].cpu(),
        candidates.token_ids[kept].int().cpu(),
        candidates.logprobs[kept].cpu(),
        is_taken[kept].int().argmax(-1).cpu(),
        count(kept),
        count(torch.ones_like(kept)),
        count(~is_inside),
    )
