"""Speculative decoding: which of the tokens that vLLM drafted are emitted.

vLLM drafts some tokens for each request and reads them in one pass. That gives the logits of every
drafted position and of the one after them, and the hidden states from which these come. A proxy
decides each of these rows as if there were no drafts: its noise is a function of the request and the
position, or fresh. The decided tokens are emitted up to the first that is not the drafted one, which
is still emitted itself.

So the distribution is that without drafts, whatever the drafts are, and with a seed the tokens are
the same. Where drafts are a function of the text, as n-grams and greedy draft models are, no
verification accepts more of them: a draft is accepted with the probability of its token.

B = requests of the step, R = logits rows.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from proxy.engine.device import to_device


class DraftRows(NamedTuple):
    """The rows of a step with drafts: each request has one for each of them and one more, one after another."""

    counts: list[int]  # [B] rows of each request
    requests: Tensor  # [R] int64, index of each row's request
    first_rows: Tensor  # [R] int64, the first row of that request
    offsets: Tensor  # [R] int64, rows of that request before this one
    from_end: Tensor  # [R] int64, the same less those of the request's last row: 0 and below

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> Self:
        """From the number of rows of each request [B]."""
        requests = np.arange(len(counts)).repeat(counts)
        rows, ends = np.arange(len(requests)), np.cumsum(counts)
        first_rows, last_rows = (ends - counts)[requests], (ends - 1)[requests]
        columns = np.stack((requests, first_rows, rows - first_rows, rows - last_rows))
        return cls(counts, *to_device(columns, torch.int64, device).unbind(0))

    def expand(self, of_requests: Sequence[str]) -> list[str]:
        """Something of each request [B], row by row [R]."""
        return [x for x, count in zip(of_requests, self.counts, strict=True) for _ in range(count)]

    def positions(self, seq_lens: Tensor) -> Tensor:
        """Index of the token to be drawn: [R] int32. `seq_lens` [B or more] counts the drafts too."""
        return (seq_lens[self.requests] + self.from_end).int()

    def requests_of(self, rows: Collection[int]) -> list[int]:
        """The requests that these rows are all rows of."""
        last_rows = {*rows}
        return [i for i, end in enumerate(accumulate(self.counts)) if end - 1 in last_rows]

    def is_rejected(self, tokens: Tensor, drafts: Tensor) -> Tensor:
        """Whether a row comes after a rejected draft: [R] bool.

        Args:
            tokens: [R], the decided ones.
            drafts: [R], those drafted for the same positions; -1 = none, as in a request's last row.
        """
        mismatches = (tokens != drafts).long()
        before = mismatches.cumsum(0) - mismatches
        return before > before[self.first_rows]

    def emitted(self, tokens: Tensor, drafts: Tensor, size: int) -> Tensor:
        """The decided tokens by request: [B, size], -1 from the first rejected row on."""
        output = tokens.new_full((len(self.counts), size), -1)
        output[self.requests, self.offsets] = tokens.masked_fill(
            self.is_rejected(tokens, drafts), -1
        )
        return output
