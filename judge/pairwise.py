"""The pairwise judge: the LLM reads both responses and names the better one with a single token.

It implements `judge.protocol.Judge` over any engine: whoever makes it passes a function that reads two next-token
log-probabilities, and one that generates text.
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass

from judge.choice import ChoicePrompt, ChoiceReading, label_probabilities
from judge.principles import Principle
from judge.prompts import (
    ChatTokenizer,
    Choice,
    Question,
    judge_prompt_ids,
    label_ids,
    shorten,
    without_marks,
)
from judge.protocol import Usage
from judge.verdict import TIE, PairResult, Verdict, orders

Labels = tuple[int, ...]
ReadLabels = Callable[[list[list[int]], list[Labels]], Awaitable[list[tuple[float, ...]]]]
"""(token ids of each prompt, its ids of " A", " B", ...) -> these labels' next-token logprobs for each prompt."""

ReadText = Callable[[list[int], int], AsyncGenerator[tuple[str, int], None]]
"""(token ids, maximum number of tokens) -> the generated text in pieces, each with its number of tokens."""


@dataclass(frozen=True)
class EncodedQuestion:
    """A question by one principle, as the engine reads it."""

    question: Question
    """As shortened."""
    truncated: bool
    prompts: tuple[list[int], list[int]]
    """Token ids of the question as asked, and with the responses swapped."""


@dataclass(frozen=True)
class EncodedChoice:
    """A choice by one principle, as the engine reads it."""

    truncated: bool
    prompts: list[list[int]]
    """Token ids, one prompt an order."""
    labels: Labels
    """The token of each position."""


class PairwiseJudge:
    """The judge of the SELF-JUDGE paper: the probability of one token, averaged over both orders.

    Args:
        tokenizer: the LLM's
        principles: what to judge by, by name
        read_labels: asks the engine for judgments
        read_text: has the engine write a rationale
        max_tokens: limit of a judge prompt, without the label and the rationale
        tie_band: see Verdict
    """

    kind = "pairwise"

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        principles: Mapping[str, Principle],
        read_labels: ReadLabels,
        read_text: ReadText,
        *,
        max_tokens: int,
        tie_band: float = 0.0,
    ) -> None:
        self.tokenizer, self.principles = tokenizer, principles
        self.read_labels, self.read_text = read_labels, read_text
        self.max_tokens, self.tie_band = max_tokens, tie_band
        self.usage = Usage()

    async def compare(self, questions: Sequence[Question]) -> list[PairResult]:
        """Judge every question by every principle in both orders, all in one batch.

        Identical responses tie and cost nothing.

        Raises JudgePromptError where the tokenizer cannot carry a judgment, and whatever
        `read_labels` raises.
        """
        encoded = [
            # In a thread: the tokenizer's work must not stop the event loop, and a cancelled task does no more of it.
            await asyncio.to_thread(self._encode_all, question)
            for question in questions
            if question.first != question.second
        ]
        principles = self.principles.values() if encoded else ()
        labels: list[Labels] = [label_ids(self.tokenizer, principle) for principle in principles]
        prompts = [ids for row in encoded for entry in row for ids in entry.prompts]
        prompt_labels = [pair for _ in encoded for pair in labels for _ in range(2)]
        logprobs = await self.read_labels(prompts, prompt_labels) if prompts else []
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.completion_tokens += len(prompts)
        return pair_results(questions, encoded, logprobs, self.principles, self.tie_band)

    async def choose(self, choice: Choice, shown: Sequence[list[int]]) -> list[ChoiceReading]:
        """Choose among all responses at once, by every principle, as shown in each order; all in one batch.

        Raises JudgePromptError where the tokenizer or a principle cannot carry the choice, and whatever `read_labels`
        raises.
        """
        encoded = await asyncio.to_thread(self._encode_choices, choice, shown)
        prompts = [ids for row in encoded for ids in row.prompts]
        labels = [row.labels for row in encoded for _ in row.prompts]
        logprobs = iter(await self.read_labels(prompts, labels))
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.completion_tokens += len(prompts)
        by_principle = {
            name: [label_probabilities(next(logprobs)) for _ in row.prompts]
            for name, row in zip(self.principles, encoded, strict=True)
        }
        truncated = any(row.truncated for row in encoded)
        return [
            ChoiceReading(order, {name: rows[i] for name, rows in by_principle.items()}, truncated)
            for i, order in enumerate(shown)
        ]

    async def rationale(
        self, question: Question, principle: str, verdict: Verdict, max_tokens: int
    ) -> AsyncGenerator[str, None]:
        """The reasons for a verdict by one of the principles, in pieces; the first response is called A.

        Identical responses have no rationale.
        """
        if question.first == question.second:
            return
        template = self.principles[principle]
        encoded = await asyncio.to_thread(self._encode, question, template)
        prefers_second = verdict.probability < 0.5
        prompt = [*encoded.prompts[0], label_ids(self.tokenizer, template)[prefers_second]]
        self.usage.prompt_tokens += len(prompt)
        begun = False
        async with aclosing(self.read_text(prompt, max_tokens)) as pieces:
            async for text, tokens in pieces:
                self.usage.completion_tokens += tokens
                text = text if begun else text.lstrip(". \n")  # ends the sentence of the label
                if text:
                    begun = True
                    yield text

    def _encode_choices(self, choice: Choice, shown: Sequence[list[int]]) -> list[EncodedChoice]:
        return [
            encode_choice(self.tokenizer, choice, shown, principle, self.max_tokens)
            for principle in self.principles.values()
        ]

    def _encode_all(self, question: Question) -> list[EncodedQuestion]:
        return [self._encode(question, principle) for principle in self.principles.values()]

    def _encode(self, question: Question, principle: Principle) -> EncodedQuestion:
        return encode_question(self.tokenizer, question, principle, self.max_tokens)


def pair_results(
    questions: Sequence[Question],
    encoded: Sequence[Sequence[EncodedQuestion]],
    logprobs: Iterable[Sequence[float]],
    principles: Collection[str],
    tie_band: float,
) -> list[PairResult]:
    """One result a question; identical responses tie.

    Args:
        encoded: of each question whose responses differ, by each principle.
        logprobs: of both labels after each prompt of `encoded`, in order.
    """
    rows, reads, results = iter(encoded), iter(logprobs), []
    for question in questions:
        row = next(rows) if question.first != question.second else ()
        pairs = [orders(next(reads), next(reads)) for _ in row] or [TIE for _ in principles]
        verdicts = [Verdict(pair, tie_band) for pair in pairs]
        truncated = any(entry.truncated for entry in row)
        results.append(PairResult(dict(zip(principles, verdicts, strict=True)), truncated))
    return results


def encode_question(
    tokenizer: ChatTokenizer, question: Question, principle: Principle, max_tokens: int
) -> EncodedQuestion:
    """A question in both orders, without marks that forge the prompt, and shortened beyond `max_tokens`."""

    def encode(question: Question) -> tuple[list[int], list[int]]:
        return (
            judge_prompt_ids(tokenizer, question, principle),
            judge_prompt_ids(tokenizer, question.swapped, principle),
        )

    def fits(candidate: Question) -> bool:
        return max(map(len, encode(candidate))) <= max_tokens

    question = without_marks(tokenizer, question, principle.headings)
    short = shorten(question, fits, max_tokens)
    return EncodedQuestion(short, short is not question, encode(short))


def encode_choice(
    tokenizer: ChatTokenizer,
    choice: Choice,
    shown: Sequence[list[int]],
    principle: Principle,
    max_tokens: int,
) -> EncodedChoice:
    """A choice in each order, without marks that forge the prompt, and shortened beyond `max_tokens`."""
    prompt = ChoicePrompt(tokenizer, principle, len(choice.responses))

    def encode(choice: Choice) -> list[list[int]]:
        orders = ([choice.responses[i] for i in order] for order in shown)
        return [prompt.ids(choice.having(choice.prompt, texts)) for texts in orders]

    def fits(candidate: Choice) -> bool:
        return max(map(len, encode(candidate))) <= max_tokens

    choice = without_marks(tokenizer, choice, prompt.headings)
    short = shorten(choice, fits, max_tokens)
    return EncodedChoice(short is not choice, encode(short), prompt.labels)
