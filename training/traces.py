"""What both vLLM backends share: sampling parameters of a request, and decisions from traces.

Decisions are read from traces because these contain what the engine decided on, rounding included. From hidden states
alone it would take the head's logits at every token to compute them.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from proxy.request import TRACE_TOKENS
from training.console import TrainingError
from training.policy import Decoding
from training.rollout import Decisions

Entry = dict[str, Any]
"""The entry of a token: the proxy's decisions and the emitted token (see the server's traces)."""
Asked = tuple[int, float, bool]
"""A candidate's token id, its probability within the nucleus, and whether it was accepted."""

TINIEST = 2.0**-149
"""The smallest positive float32: upper bound of a probability that is traced as 0."""


def refuse_untraceable(decoding: Decoding, rollout: str) -> None:
    """
    Raises:
        TrainingError: responses may be longer than traces.
    """
    if decoding.max_new_tokens > TRACE_TOKENS:
        raise TrainingError(
            f"--rollout {rollout}: --decoding.max-new-tokens {decoding.max_new_tokens} is over {TRACE_TOKENS}, the "
            "longest trace of a response; --rollout transformers has no such limit"
        )


def sampling(decoding: Decoding, end_ids: Collection[int], seed: int) -> dict[str, Any]:
    """Sampling parameters of a response, by names that vLLM's `SamplingParams` and its HTTP API share."""
    return {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "max_tokens": decoding.max_new_tokens,
        "stop_token_ids": sorted(end_ids),
        "ignore_eos": True,  # `end_ids` includes the end, if it ends a response
        "seed": (seed + 2**63) % 2**64 - 2**63,  # as an int64, which gives the same noise
    }


def asked(entry: Entry) -> list[Asked]:
    """The candidates that the proxy decided at a position, from the trace; the most probable first."""
    decided = [
        (candidate["token_id"], candidate["probability"], False) for candidate in entry["rejected"]
    ]
    if not entry["forced"] and entry["accept_probability"] is not None:
        decided.append((entry["token_id"], entry["probability"], True))
    return sorted(decided, key=lambda decision: (-decision[1], decision[0]))


def decisions(
    traces: Sequence[Sequence[Entry]],
    hidden_at: Callable[[Sequence[int], Sequence[int]], Tensor],
    device: torch.device,
) -> Decisions:
    """The proxy's decisions in N responses.

    Args:
        traces: of each response, one entry for each token.
        hidden_at: the lm_head's input, [D, H] on the device, at D tokens, given the response of each token and its
            index in it. Both are sorted; a token occurs once for each of its decisions.
        device: of the decisions.
    """
    rows = [
        (episode, index, *decision)
        for episode, trace in enumerate(traces)
        for index, entry in enumerate(trace)
        for decision in asked(entry)
    ]
    episodes, indices, token_ids, probabilities, accepted = (
        zip(*rows, strict=True) if rows else ([],) * 5
    )
    return Decisions(
        hidden_at(episodes, indices),
        torch.tensor(token_ids, dtype=torch.long, device=device),
        torch.tensor([math.log(p or TINIEST) for p in probabilities], device=device),
        torch.tensor(accepted, dtype=torch.bool, device=device),
        torch.tensor(episodes, dtype=torch.long, device=device),
    )
