"""Scores of finished responses, from the reward models that `training.reward_model` makes.

Implicit (Rafailov et al., arXiv 2305.18290): r(x, y) = β · Σ_t log π_rm(y_t | x, y_<t) / π_ref(y_t | x, y_<t), where
π_rm was trained on the pairs with the Bradley–Terry (DPO) loss from π_ref, the frozen LLM.
Scalar: a linear head on the last token of prompt and response.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from proxy.checkpoint import BaseModelId, FingerprintMismatch
from training.console import TrainingError

REWARD_FILE = "reward.json"


class RewardConfig(BaseModel):
    """What `reward.json` beside a reward model's weights says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["implicit", "scalar"]
    beta: float
    """Scale of the implicit reward."""
    base: BaseModelId
    """The model that it was trained from: π_ref of the implicit reward."""


class Reward(Protocol):
    """Token ids of N prompts and N responses -> N scores, higher is better."""

    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor: ...


def load_reward(directory: Path, reference: PreTrainedModel, base: BaseModelId) -> Reward:
    """The reward in `directory`; `reference` is the frozen LLM itself, `base` its identity.

    Raises:
        TrainingError: no such reward model, or it is damaged.
        FingerprintMismatch: an implicit reward that was trained from another LLM.
    """
    try:
        config = RewardConfig.model_validate_json((directory / REWARD_FILE).read_text())
    except (OSError, ValidationError) as error:
        raise TrainingError(
            f"{directory} is not a reward model: it needs the {REWARD_FILE} that training.reward_model writes ({error})"
        ) from None
    if config.kind == "scalar":
        scorer = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=reference.dtype
        )
        return ScalarReward(scorer.eval())
    if config.base.fingerprint != base.fingerprint:
        raise FingerprintMismatch(
            f"the implicit reward in {directory} was trained from {config.base.name!r} ({config.base.fingerprint}), "
            f"but the frozen LLM is {base.name!r} ({base.fingerprint}); train it again from this one"
        )
    tuned = AutoModelForCausalLM.from_pretrained(directory, dtype=reference.dtype)
    return ImplicitReward(tuned.eval(), reference, config.beta)


class ImplicitReward:
    """β · log(π_rm / π_ref) of a response."""

    def __init__(self, tuned: PreTrainedModel, reference: PreTrainedModel, beta: float) -> None:
        self.tuned, self.reference, self.beta = tuned, reference, beta

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        tuned, reference = (
            sequence_logprobs(model, prompts, responses) for model in (self.tuned, self.reference)
        )
        return self.beta * (tuned - reference)


class ScalarReward:
    """The score of a sequence-classification model with one label."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        ids, mask, _ = pad_right(prompts, responses, self.scorer.config.pad_token_id or 0)
        device = self.scorer.device
        return self.scorer(ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()


def sequence_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> Tensor:
    """log π(response | prompt), summed over the response's tokens: [N], natural log."""
    ids, _, is_response = pad_right(prompts, responses, 0)
    # Right padding under a causal mask changes nothing that is read below.
    logits = model(ids.to(model.device)).logits[:, :-1].float()
    targets = ids[:, 1:].to(model.device)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return (logprobs * is_response[:, 1:].to(model.device)).sum(-1)


def pad_right(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask of tokens, mask of response tokens), each [N, T], 1 = is one."""
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask, is_response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        is_response[i, len(prompt) : len(row)] = 1
    return ids, mask, is_response


def write_reward_config(directory: Path, config: RewardConfig) -> None:
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    (directory / REWARD_FILE).write_text(text, encoding="utf-8")
