"""Judges of pairs in this process, for self-training and for comparisons of judges.

The server's judges compare asynchronously through an engine. These return tensors from a model in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from judge.messages import Message
from judge.prompts import Question
from judge.verdict import PairResult, Verdict
from proxy.hub import resolve_dir
from training.console import TrainingError
from training.conversations import Conversations
from training.reward_loading import load_reward, model_judges
from training.rewards import SELF_JUDGE, Frozen, JudgeReward, Reward, Sample


class PairJudge(Protocol):
    """Judges N questions: log p(first wins) / p(second wins), natural log, as shown in each order: [N, 2]."""

    def log_odds(self, questions: Sequence[Question]) -> Tensor: ...


class RewardJudge:
    """Judges by the difference of a reward's scores, which is the same in both orders."""

    def __init__(self, reward: Reward, frozen: Frozen) -> None:
        self.reward, self.chats = reward, Conversations(frozen.tokenizer)
        self._last: dict[tuple[str, str], float] = {}

    def log_odds(self, questions: Sequence[Question]) -> Tensor:
        sides = [
            (question.prompt, text)
            for question in questions
            for text in (question.first, question.second)
        ]
        keys = [(repr(prompt), text) for prompt, text in sides]
        # A knock-out compares the winners again.
        known = {key: self._last[key] for key in keys if key in self._last}
        new = {
            key: self._sample(*side)
            for key, side in zip(keys, sides, strict=True)
            if key not in known
        }
        if new:
            known |= dict(zip(new, self.reward(list(new.values())).tolist(), strict=True))
        self._last = known
        scores = torch.tensor([known[key] for key in keys]).view(-1, 2)
        return (scores[:, :1] - scores[:, 1:]).expand(-1, 2)

    def _sample(self, prompt: Sequence[Message], text: str) -> Sample:
        messages = [{**turn} for turn in prompt]
        return Sample(messages, text, *self.chats.split_ids(messages, text))  # type: ignore[arg-type]


def load_judges(
    name: str | None, frozen: Frozen, principles: Sequence[str] = ()
) -> dict[str, PairJudge]:
    """Judges, by the name of what they judge by: a principle, or "score".

    Args:
        name: a directory from `training.jsft --lora-rank`, or another reward's name, to judge by its scores; None = the
            frozen LLM judges itself
        frozen: the LLM; a LoRA stays loaded on it and is active for the judge only
        principles: names; empty = the first one. Rewards that only score have none

    Raises:
        TrainingError: there is no such judge, or no such principle.
        FingerprintMismatch: it was trained from another LLM.
    """
    if name is None:
        return {
            **model_judges(
                frozen.without_adapter, frozen, Path(frozen.model.name_or_path), principles
            )
        }
    if name.partition(":")[0] == SELF_JUDGE:
        raise TrainingError(
            f"{name!r} is the default judge: leave --judge out, and choose principles with --principles"
        )
    reward = load_reward(name, frozen)
    if isinstance(reward, JudgeReward):
        return {**model_judges(reward.judge.model, frozen, resolve_dir(name), principles)}
    if principles:
        raise TrainingError(f"{name!r} judges by scores: it has no principles")
    return {"score": RewardJudge(reward, frozen)}


def judge_pairs(judges: Mapping[str, PairJudge], questions: Sequence[Question]) -> list[PairResult]:
    """The results of all judges, one for each question."""
    orders = [judge.log_odds(questions).sigmoid().tolist() for judge in judges.values()]
    return [
        PairResult({name: Verdict((a, b)) for name, (a, b) in zip(judges, row, strict=True)})
        for row in zip(*orders, strict=True)
    ]
