"""Speculative decoding: which of the tokens that vLLM drafted are emitted.

vLLM drafts some tokens for each request and reads them in one pass. That gives the logits of every
drafted position and of the one after them, and the hidden states from which these come. A proxy
decides each of these rows as if there were no drafts: its noise is a function of the request and the
position, or fresh. The decided tokens are emitted up to the first that is not the drafted one, which
is still emitted itself.

So the distribution is that without drafts, whatever the drafts are, and with a seed the tokens are
the same. Where drafts are a function of the text, as n-grams and greedy draft models are, no
verification accepts more of them: a draft is accepted with the probability of its token.

B = requests of the step, R = logits rows, S = rows of the request that has most.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from proxy.engine.device import to_device


class Drafts(NamedTuple):
    """The drafts of a step. A request has a row for each of them and one more, one after another."""

    counts: list[int]  # [B] rows of each request
    requests: Tensor  # [R] int64, index of each row's request
    first_rows: Tensor  # [R] int64, the first row of that request
    offsets: Tensor  # [R] int64, rows of that request before this one
    token_ids: Tensor  # [R] int, drafted for the row's position; -1 = none, as in the last row

    @classmethod
    def of(cls, counts: list[int], token_ids: Tensor) -> Self:
        """Rows of each request [B], and the drafted tokens [R]."""
        ends = np.cumsum(counts)
        requests = np.arange(len(counts)).repeat(counts)
        first_rows = (ends - counts)[requests]
        layout = np.stack((requests, first_rows, np.arange(len(requests)) - first_rows))
        columns = to_device(layout, torch.int64, token_ids.device).unbind(0)
        return cls(counts, *columns, token_ids)

    def expand(self, of_requests: Sequence[str]) -> list[str]:
        """Something of each request [B], row by row [R]."""
        return [x for x, count in zip(of_requests, self.counts, strict=True) for _ in range(count)]

    def positions(self, seq_lens: Tensor) -> Tensor:
        """Index of the token to be drawn [R] int32; `seq_lens` [B] counts the drafted tokens too."""
        lengths = to_device(self.counts, torch.int64, seq_lens.device)
        known = seq_lens[: len(self.counts)] - lengths + 1
        return (known[self.requests] + self.offsets).int()

    def is_rejected(self, token_ids: Tensor) -> Tensor:
        """Whether a row comes after a rejected draft: [R] bool, of the decided tokens [R]."""
        mismatches = (token_ids != self.token_ids).long()
        before = mismatches.cumsum(0) - mismatches
        return before > before[self.first_rows]

    def emitted(self, token_ids: Tensor) -> Tensor:
        """The decided tokens [R] by request: [B, S], -1 from the first rejected row on."""
        output = token_ids.new_full((len(self.counts), max(self.counts)), -1)
        output[self.requests, self.offsets] = token_ids.masked_fill(self.is_rejected(token_ids), -1)
        return output
