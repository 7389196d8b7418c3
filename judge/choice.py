"""A choice among N responses by one token: the LLM reads them all, labelled A, B, C ..., and names the best.

One reading has N responses, and the N - 1 comparisons of a knock-out have 4 (N - 1). But a model favours positions, and
few were trained to choose among more than two. So the responses are shown in several orders, rotations of one: in N
readings every response stands once at every position (a Latin square), and the mean of log p is free of whatever a
position adds to it. Fewer readings cancel less.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from judge.messages import Message
from judge.principles import Principle
from judge.prompts import (
    ChatTokenizer,
    Choice,
    JudgePromptError,
    conversation_text,
    encode,
    label_id,
    label_ids,
    render,
)


@dataclass(frozen=True)
class ChoiceReading:
    """One choice, by each principle."""

    order: list[int]
    """Indices of the samples as they were shown."""
    probabilities: Mapping[str, list[float]]
    """By principle: that of each, in this order, renormalised over the labels."""
    truncated: bool = False
    """A text was shortened to fit the judge's context."""


class ChoicePrompt:
    """A principle's judge prompt for N responses.

    Raises JudgePromptError for a principle whose question does not show the responses one after the other with a letter
    B between them, and for a tokenizer with too few letters that are one token of their own.
    """

    def __init__(self, tokenizer: ChatTokenizer, principle: Principle, num: int) -> None:
        label_ids(tokenizer, principle)  # says what is wrong with A or B
        self.tokenizer, self.principle = tokenizer, principle
        parts = [(literal, name) for literal, name, *_ in _FORMATTER.parse(principle.question)]
        names = [name for _, name in parts]
        first = names.index("response_a")
        between = parts[first + 1][0] if names[first + 1 : first + 2] == ["response_b"] else ""
        if len(_SECOND.findall(between)) != 1:
            raise JudgePromptError(
                "a choice among several needs a principle whose question has {response_b} right after {response_a}, "
                "with one letter B between them"
            )
        self._parts = parts[: first + 1], parts[first + 2 :]
        text = render(tokenizer, self.messages(Choice([], ("",)), separators=[]))
        prompt = encode(tokenizer, text)
        found: dict[int, str] = {}
        for letter in string.ascii_uppercase:
            token = label_id(tokenizer, text, prompt, f" {letter}")
            if token is not None:
                found.setdefault(token, letter)
            if len(found) == num:
                break
        else:
            raise JudgePromptError(
                f"a choice among {num} needs as many letters, but this tokenizer writes only {len(found)} as one token "
                f"of their own after {principle.answer!r}: choose a strategy that compares pairs"
            )
        self.labels = tuple(found)
        """The token of each position."""
        _, *letters = found.values()
        self._separators = [_SECOND.sub(letter, between) for letter in letters]

    @property
    def headings(self) -> list[str]:
        """The lines around the texts."""
        lines = [line.strip() for text in self._separators for line in text.splitlines()]
        return [*self.principle.headings, *filter(None, lines)]

    def messages(self, choice: Choice, separators: Sequence[str] | None = None) -> list[Message]:
        """The chat that asks which response is best; its last message is to be continued by a label."""
        separators = self._separators if separators is None else separators
        before, after = self._parts
        first, *others = choice.responses
        responses = first + "".join(map("".join, zip(separators, others, strict=True)))
        texts = {"conversation": conversation_text(choice.prompt), "response_a": responses}
        question = "".join(
            literal + (texts[name] if name else "") for literal, name in (*before, *after)
        )
        return [
            {"role": "system", "content": self.principle.system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": self.principle.answer},
        ]

    def ids(self, choice: Choice) -> list[int]:
        """Token ids of the judge prompt, up to and including the assistant's prefix."""
        return encode(self.tokenizer, render(self.tokenizer, self.messages(choice)))


_FORMATTER = string.Formatter()
_SECOND = re.compile(r"\bB\b")


def rotate(order: Sequence[int], count: int) -> list[list[int]]:
    """`count` rotations of an order, as far from one another as possible."""
    starts = [i * len(order) // count for i in range(count)]
    return [[*order[start:], *order[:start]] for start in starts]


def rank_readings(readings: Sequence[ChoiceReading]) -> list[int]:
    """The samples by their mean log p over all readings and principles, the best first; ties as first shown."""
    scores = dict.fromkeys(readings[0].order, 0.0)
    for reading in readings:
        for row in reading.probabilities.values():
            for sample, probability in zip(reading.order, row, strict=True):
                scores[sample] += math.log(max(probability, _LEAST))
    return sorted(scores, key=scores.__getitem__, reverse=True)


_LEAST = 1e-30
"""A probability below this counts as this: one that rounds to 0 must not decide alone."""


def label_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Renormalised over the labels. Natural logs, not all -inf."""
    most = max(logprobs)
    odds = [math.exp(logprob - most) for logprob in logprobs]
    return [odd / sum(odds) for odd in odds]
