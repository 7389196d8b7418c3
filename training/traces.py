"""What rollouts in vLLM have in common, wherever it runs: how a response is asked for, and what its trace says.

What the proxy was asked comes from the traces, for that is what the engine decided on, rounding included; from hidden
states alone it would take the head's logits of every token to know it.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from proxy.history import TRACE_TOKENS
from training.console import TrainingError
from training.policy import Decoding
from training.rollout import Decisions

Entry = dict[str, Any]
"""Of a token: what the proxy was asked, and what it said (see `server/traces.py`)."""
Asked = tuple[int, float, bool]
"""A candidate's token id, its probability within the nucleus, and whether it was accepted."""

TINIEST = 2.0**-149
"""The smallest float32 above 0: what a traced probability of 0 is at most."""


def refuse_untraceable(decoding: Decoding, rollout: str) -> None:
    """
    Raises:
        TrainingError: responses may be longer than traces are.
    """
    if decoding.max_new_tokens > TRACE_TOKENS:
        raise TrainingError(
            f"--rollout {rollout}: --decoding.max-new-tokens {decoding.max_new_tokens} is over {TRACE_TOKENS}, which "
            "is all that is traced of a response; --rollout transformers has no such limit"
        )


def sampling(decoding: Decoding, end_ids: Collection[int], seed: int) -> dict[str, Any]:
    """How a response is drawn, by names that vLLM's sampling parameters and its HTTP API share."""
    return {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "max_tokens": decoding.max_new_tokens,
        "stop_token_ids": sorted(end_ids),
        "ignore_eos": True,  # the end is among `end_ids`, or it is none
        "seed": (seed + 2**63) % 2**64 - 2**63,  # as an int64; the noise of both is the same
    }


def asked(entry: Entry) -> list[Asked]:
    """The candidates that the proxy was asked about at a position, from the trace; the most probable first."""
    found = [(each["token_id"], each["probability"], False) for each in entry["rejected"]]
    if not entry["forced"] and entry["accept_probability"] is not None:
        found.append((entry["token_id"], entry["probability"], True))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def decisions(
    traces: Sequence[Sequence[Entry]],
    hidden_at: Callable[[Sequence[int], Sequence[int]], Tensor],
    device: torch.device,
) -> Decisions:
    """What the proxy decided in N responses.

    Args:
        traces: of each response, an entry a token.
        hidden_at: the lm_head's input, [D, H] on the device, that D tokens were drawn from, given the response of each
            and its index in it; both rise, and tokens come as often as candidates were put to the proxy.
        device: where the decisions are wanted.
    """
    found = [
        (episode, index, *one)
        for episode, trace in enumerate(traces)
        for index, entry in enumerate(trace)
        for one in asked(entry)
    ]
    episodes, indices, token_ids, probabilities, accepted = (
        zip(*found, strict=True) if found else ([],) * 5
    )
    return Decisions(
        hidden_at(episodes, indices),
        torch.tensor(token_ids, dtype=torch.long, device=device),
        torch.tensor([math.log(p or TINIEST) for p in probabilities], device=device),
        torch.tensor(accepted, dtype=torch.bool, device=device),
        torch.tensor(episodes, dtype=torch.long, device=device),
    )
