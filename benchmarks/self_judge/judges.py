"""Judges side by side: each says of a pair, in either order, with what probability the first response is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from judge.principles import principles_of
from judge.prompts import Message, Question
from training.judging import ModelJudge
from training.models import Conversations, context_of
from training.rewards import Frozen, JudgeReward, Reward, Sample, load_reward

BATCH = 64


class PairJudge(Protocol):
    """N questions -> [N, 2]: P(first is better) as shown first, and as shown second."""

    def __call__(self, questions: Sequence[Question]) -> Tensor: ...


@dataclass(frozen=True)
class Asking:
    """The paper's judge: a token's probability."""

    judge: ModelJudge

    def __call__(self, questions: Sequence[Question]) -> Tensor:
        return self.judge.log_odds(questions).sigmoid()


class Scoring:
    """By a reward's difference, as it was trained (Bradley–Terry); alike in both orders."""

    def __init__(self, reward: Reward, frozen: Frozen) -> None:
        self.reward, self.chats = reward, Conversations(frozen.tokenizer)
        self._scores: dict[tuple[str, str], float] = {}

    def __call__(self, questions: Sequence[Question]) -> Tensor:
        new = {
            (q.prompt[-1]["content"], text): self._sample(q.prompt, text)
            for q in questions
            for text in (q.first, q.second)
            if (q.prompt[-1]["content"], text) not in self._scores
        }
        if new:
            self._scores |= dict(zip(new, self.reward(list(new.values())).tolist(), strict=True))
        differences = [
            self._scores[q.prompt[-1]["content"], q.first]
            - self._scores[q.prompt[-1]["content"], q.second]
            for q in questions
        ]
        return torch.tensor(differences).sigmoid().unsqueeze(-1).expand(-1, 2)

    def _sample(self, prompt: Sequence[Message], text: str) -> Sample:
        messages = [{**turn} for turn in prompt]
        return Sample(messages, text, *self.chats.split_ids(messages, text))  # type: ignore[arg-type]


def load_judge(directory: Path | None, frozen: Frozen, principle: str | None = None) -> PairJudge:
    """The judge in a directory; None = the frozen LLM itself."""
    if directory is None:
        principles = principles_of(Path(frozen.model.name_or_path))
        name = principle or next(iter(principles))
        asked = principles[name]
        return Asking(
            ModelJudge(frozen.model, frozen.tokenizer, asked, context_of(frozen.model), BATCH)
        )
    reward = load_reward(str(directory), frozen)
    if not isinstance(reward, JudgeReward):
        return Scoring(reward, frozen)
    if principle is None:
        return Asking(reward.judge)
    asked = principles_of(directory)[principle]
    model = reward.judge.model
    return Asking(ModelJudge(model, frozen.tokenizer, asked, context_of(frozen.model), BATCH))
