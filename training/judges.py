"""Who says which of two responses is better, in this process: what self-training and comparisons of judges ask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from judge.principles import principles_of
from judge.prompts import Message, Question
from judge.verdict import Ruling, Verdict
from training.console import TrainingError
from training.judging import ModelJudge
from training.models import Conversations, context_of
from training.rewards import Frozen, JudgeReward, Reward, Sample, load_reward


class PairJudge(Protocol):
    """log p(first wins) / p(second wins), natural, as shown in either order: N questions -> [N, 2]."""

    def log_odds(self, questions: Sequence[Question]) -> Tensor: ...


class Scores:
    """Judges by the difference of a reward's scores: alike in both orders, and each response is scored once."""

    def __init__(self, reward: Reward, frozen: Frozen) -> None:
        self.reward, self.chats = reward, Conversations(frozen.tokenizer)
        self._known: dict[tuple[str, str], float] = {}

    def log_odds(self, questions: Sequence[Question]) -> Tensor:
        new = {
            (_key(question), text): self._sample(question.prompt, text)
            for question in questions
            for text in (question.first, question.second)
            if (_key(question), text) not in self._known
        }
        if new:
            self._known |= dict(zip(new, self.reward(list(new.values())).tolist(), strict=True))
        known = self._known
        differences = [known[_key(q), q.first] - known[_key(q), q.second] for q in questions]
        return torch.tensor(differences).unsqueeze(-1).expand(-1, 2)

    def _sample(self, prompt: Sequence[Message], text: str) -> Sample:
        messages = [{**turn} for turn in prompt]
        return Sample(messages, text, *self.chats.split_ids(messages, text))  # type: ignore[arg-type]


def _key(question: Question) -> str:
    return repr(question.prompt)


def load_judges(
    name: str | None, frozen: Frozen, principles: Sequence[str] = ()
) -> dict[str, PairJudge]:
    """Judges by name of what they judge by.

    Args:
        name: a directory from `training.jsft --lora-rank`, or another reward's name, to judge by its scores; None = the
            frozen LLM's own judgment
        frozen: the LLM; a LoRA stays on it, and acts for the judge alone
        principles: names; none = the first there is. A reward that is no judge knows none

    Raises:
        TrainingError: there is no such judge, or no such principle.
        FingerprintMismatch: it was trained from another LLM.
    """
    model, directory = frozen.plain, Path(frozen.model.name_or_path)
    if name is not None:
        reward = load_reward(name, frozen)
        if not isinstance(reward, JudgeReward):
            if principles:
                raise TrainingError(f"{name!r} judges by scores: it knows no principles")
            return {"score": Scores(reward, frozen)}
        model, directory = reward.judge.model, Path(name)
    known = principles_of(directory)
    for each in principles:
        if each not in known:
            raise TrainingError(f"unknown principle {each!r}; known are {', '.join(known)}")
    context = context_of(frozen.model)
    return {
        each: ModelJudge(model, frozen.tokenizer, known[each], context, frozen.batch_size)
        for each in principles or (next(iter(known)),)
    }


def rule(judges: Mapping[str, PairJudge], questions: Sequence[Question]) -> list[Ruling]:
    """What all judges say, question by question."""
    orders = [judge.log_odds(questions).sigmoid().tolist() for judge in judges.values()]
    return [
        Ruling({name: Verdict((a, b)) for name, (a, b) in zip(judges, each, strict=True)})
        for each in zip(*orders, strict=True)
    ]
