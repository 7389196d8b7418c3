"""The likelihood-ratio judge: a response's score is β · log(π / π_base), with π of a LoRA trained on preferences.

The LoRA is trained on the pairs with the Bradley–Terry (DPO) loss (Rafailov et al., arXiv 2305.18290), which makes the
probability that one response beats another sigmoid(score - score'). It reads each response alone: there is no order and
no bias for a position, and N samples cost N readings, however many pairs are compared. In the place of the LoRA π may
be the LLM with a proxy (`proxy.likelihood`).
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from judge.judge import Usage
from judge.messages import Message, text_of
from judge.principles import Principle
from judge.prompts import ChatTokenizer, Question, response_ids, shorten
from judge.verdict import Ruling, Verdict


class Reading(NamedTuple):
    """A response to be read after its prompt."""

    prompt: list[int]  # token ids
    response: list[int]  # with the end of the turn


ReadScores = Callable[[list[Reading]], Awaitable[list[float]]]
"""Readings -> log π(response | prompt) - log π_base(response | prompt) of each, in nats."""


class LikelihoodJudge:
    """Compares by scores; a response is scored once, however often it is compared.

    Args:
        tokenizer: the LLM's
        read_scores: how to ask the engine
        beta: what π was trained with
        max_tokens: a prompt's and its response's most
        tie_band: see Verdict
        kind: whose likelihood it is
        readings: how often the engine reads a response
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        read_scores: ReadScores,
        *,
        beta: float,
        max_tokens: int,
        tie_band: float = 0.0,
        kind: Literal["likelihood", "proxy"] = "likelihood",
        readings: int = 2,
    ) -> None:
        self.tokenizer, self.read_scores = tokenizer, read_scores
        self.kind, self.readings = kind, readings
        self.beta, self.max_tokens, self.tie_band = beta, max_tokens, tie_band
        self.usage = Usage()
        self._scores: dict[tuple[tuple[tuple[str, str], ...], str], float] = {}

    async def compare(
        self, questions: Sequence[Question], principles: Mapping[str, Principle]
    ) -> list[Ruling]:
        """Every question. Both orders read alike: the probability is the same in either.

        Principles are for other judges: this one judges by what it was trained on, and its kind stands in their place.
        """
        short = [self._shorten(question) for question in questions]
        new = {
            _key(question.prompt, text): self._reading(question.prompt, text)
            for question in short
            for text in (question.first, question.second)
            if question.first != question.second and _key(question.prompt, text) not in self._scores
        }
        read = await self.read_scores(list(new.values())) if new else []
        self._scores |= dict(zip(new, read, strict=True))
        for each in new.values():
            self.usage.prompt_tokens += self.readings * (len(each.prompt) + len(each.response))
            self.usage.completion_tokens += self.readings
        return [
            Ruling({self.kind: self._verdict(cut)}, truncated=cut is not question)
            for cut, question in zip(short, questions, strict=True)
        ]

    def _verdict(self, question: Question) -> Verdict:
        if question.first == question.second:
            return Verdict((0.5, 0.5), self.tie_band)
        first, second = (
            self._scores[_key(question.prompt, text)] for text in (question.first, question.second)
        )
        probability = _sigmoid(self.beta * (first - second))
        return Verdict((probability, probability), self.tie_band)

    def _shorten(self, question: Question) -> Question:
        def fits(asked: Question) -> bool:
            readings = [self._reading(asked.prompt, text) for text in (asked.first, asked.second)]
            return max(len(r.prompt) + len(r.response) for r in readings) <= self.max_tokens

        return shorten(question, fits)

    def _reading(self, prompt: Sequence[Message], text: str) -> Reading:
        return Reading(*response_ids(self.tokenizer, prompt, text))


def _key(prompt: Sequence[Message], text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    return tuple((turn["role"], text_of(turn)) for turn in prompt), text


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
