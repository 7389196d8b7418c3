"""Traces as the decisions that PPO learns from."""

import torch

from training.traces import decisions


def test_a_probability_that_float32_has_no_room_for_is_still_one() -> None:
    entry = {
        "token_id": 5,
        "probability": 1.0,
        "accept_probability": 0.5,
        "forced": False,
        "rejected": [{"token_id": 7, "probability": 0.0}],
    }
    result = decisions(
        [[entry]], lambda episodes, _: torch.zeros(len(episodes), 2), torch.device("cpu")
    )
    assert result.token_ids.tolist() == [5, 7]
    assert result.logprobs[0] == 0
    assert -104 < result.logprobs[1] < -103  # of 2**-149, float32's smallest
    assert result.accepted.tolist() == [True, False]
