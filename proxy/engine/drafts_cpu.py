"""Corrections of vLLM's speculative decoding on a CPU.

vLLM repeats each request's temperature, top-k and top-p for its drafted tokens with a kernel whose CPU
version writes to a copy of the output (vLLM's issue 55005): rows without a proxy would be sampled with
whatever was in memory. Here torch repeats them.

vLLM means to compile the search for n-grams at its start, but calls it without any request, for which
it returns early. Then the first requests would wait for the compiler, for seconds.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x: Tensor,  # [B]
    cu_num_tokens: Tensor,  # [B] int, tokens up to and including each request's
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """Each request's value for each of its tokens, [num_tokens], with one value replaced by another."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, replace_to, x).to(x.dtype)
    return values.repeat_interleave(counts, output_size=num_tokens)


def correct_drafts(runner: Any) -> None:
    """Correct a runner that drafts and whose model is loaded; the first correction is for the whole process."""
    # Imports numba. vLLM's workers do not start in a process that holds it, and import this module before.
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if isinstance(runner.drafter, NgramProposer):
        batch = runner.input_batch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba's, of the list that vLLM hands over
            runner.drafter.propose(1, [[0]], batch.num_tokens_no_spec, batch.token_ids_cpu)
