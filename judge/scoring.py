"""Judges that score each response by itself.

The probability that one response beats another is sigmoid(β · (score − score')), as Bradley and Terry have it. There is
no order and no position bias, and N samples cost N readings, however many pairs are compared.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

from judge.messages import Message, text_of
from judge.prompts import ChatTokenizer, Question, response_ids, shorten, up_to_end
from judge.protocol import Usage
from judge.verdict import TIE, PairResult, Verdict


class Reading(NamedTuple):
    """A response to be read after its prompt."""

    prompt: list[int]  # token ids
    response: list[int]  # with the end of the turn


class Answer(NamedTuple):
    """A response to be scored."""

    prompt: Sequence[Message]
    text: str
    reading: Reading
    """By the tokenizer of the LLM that the server hosts."""


_Key = tuple[tuple[tuple[str, str], ...], str]


class ScoringJudge(ABC):
    """Compares pairs by their scores; each response is scored once, however often it is compared.

    It knows no principles: it judges by what its model was trained on, and its kind stands in the principle's place.

    Args:
        tokenizer: the hosted LLM's
        kind: whose score it is
        beta: what a difference of scores is multiplied by
        max_tokens: limit of a prompt with its response
        tie_band: see Verdict
        end_ids: tokens that end a response, where nothing after them is to be read
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        kind: str,
        beta: float,
        max_tokens: int,
        tie_band: float = 0.0,
        end_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer, self.kind, self.end_ids = tokenizer, kind, end_ids
        self.beta, self.max_tokens, self.tie_band = beta, max_tokens, tie_band
        self.usage = Usage()
        self._scores: dict[_Key, float] = {}
        self._readings: dict[_Key, Reading] = {}  # a tournament compares each response many times

    @abstractmethod
    async def read(self, answers: Sequence[Answer]) -> list[float]:
        """The scores of these answers; adds to `usage`."""

    async def compare(self, questions: Sequence[Question]) -> list[PairResult]:
        """Judge every question. The probability is the same in both orders."""
        short: list[Question] = []
        new: dict[_Key, Answer] = {}
        for question in questions:
            # In a thread: the tokenizer's work must not stop the event loop, and a cancelled task does no more of it.
            cut, answers = await asyncio.to_thread(self._read_question, question)
            short.append(cut)
            new |= answers
        scores = await self.read(list(new.values())) if new else []
        self._scores |= dict(zip(new, scores, strict=True))
        return [
            PairResult({self.kind: self._verdict(cut)}, truncated=cut is not question)
            for cut, question in zip(short, questions, strict=True)
        ]

    def _read_question(self, question: Question) -> tuple[Question, dict[_Key, Answer]]:
        """The question as shortened, and its answers that have no score yet."""
        cut = self._shorten(question)
        if cut.first == cut.second:
            return cut, {}
        texts = {_key(cut.prompt, text): text for text in (cut.first, cut.second)}
        missing = {key: text for key, text in texts.items() if key not in self._scores}
        return cut, {
            key: Answer(cut.prompt, text, self._reading(cut.prompt, text))
            for key, text in missing.items()
        }

    def _verdict(self, question: Question) -> Verdict:
        if question.first == question.second:
            return Verdict(TIE, self.tie_band)
        first, second = (
            self._scores[_key(question.prompt, text)] for text in (question.first, question.second)
        )
        probability = _sigmoid(self.beta * (first - second))
        return Verdict((probability, probability), self.tie_band)

    def _shorten(self, question: Question) -> Question:
        def fits(candidate: Question) -> bool:
            texts = candidate.first, candidate.second
            readings = [self._reading(candidate.prompt, text) for text in texts]
            return max(len(r.prompt) + len(r.response) for r in readings) <= self.max_tokens

        return shorten(question, fits, self.max_tokens)

    def _reading(self, prompt: Sequence[Message], text: str) -> Reading:
        key = _key(prompt, text)
        if key not in self._readings:
            ids, response = response_ids(self.tokenizer, prompt, text)
            self._readings[key] = Reading(ids, up_to_end(response, self.end_ids))
        return self._readings[key]


def _key(prompt: Sequence[Message], text: str) -> _Key:
    return tuple((turn["role"], text_of(turn)) for turn in prompt), text


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
