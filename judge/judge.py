"""The judge as a client of some engine: questions in, rulings out.

One judge serves one request; `usage` counts the tokens that request spent on judging.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from judge.principles import Principle
from judge.prompts import ChatTokenizer, Question, judge_prompt_ids, label_ids, shorten
from judge.verdict import TIE, Ruling, Verdict, orders

Labels = tuple[int, int]
ReadLabels = Callable[[list[list[int]], list[Labels]], Awaitable[list[tuple[float, float]]]]
"""(each prompt's token ids, its ids of " A" and " B") -> both labels' next-token logprobs, for each."""

ReadText = Callable[[list[int], int], AsyncGenerator[tuple[str, int], None]]
"""(token ids, most tokens) -> what the engine writes after them, piece by piece: text and tokens."""


@dataclass
class Usage:
    """Tokens spent. A judgment reads its prompt and writes one token."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Asked:
    """A question by one principle, as the engine reads it."""

    question: Question
    """As it was shortened."""
    truncated: bool
    prompts: tuple[list[int], list[int]]
    """Token ids, in the order that was asked for and in the other."""


class Judge:
    """The paper's judge: a token's probability, in both orders.

    Args:
        tokenizer: the LLM's
        read_labels: how to ask the engine for a judgment
        read_text: how to have it write
        max_tokens: a judge prompt's most, without the label and the rationale
        tie_band: see Verdict
    """

    kind = "pairwise"

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        read_labels: ReadLabels,
        read_text: ReadText,
        *,
        max_tokens: int,
        tie_band: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.read_labels, self.read_text = read_labels, read_text
        self.max_tokens, self.tie_band = max_tokens, tie_band
        self.usage = Usage()

    async def compare(
        self, questions: Sequence[Question], principles: Mapping[str, Principle]
    ) -> list[Ruling]:
        """Every question by every principle in both orders, all in one batch.

        Identical responses tie and cost nothing.

        Raises JudgePromptError where the tokenizer cannot carry a judgment, and whatever
        `read_labels` raises.
        """
        asked = [
            [ask(self.tokenizer, question, each, self.max_tokens) for each in principles.values()]
            for question in questions
            if question.first != question.second
        ]
        labels = [label_ids(self.tokenizer, each) for each in principles.values()] if asked else []
        prompts = [ids for row in asked for each in row for ids in each.prompts]
        of_prompts = [pair for _ in asked for pair in labels for _ in range(2)]
        read = iter(await self.read_labels(prompts, of_prompts) if prompts else ())
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.completion_tokens += len(prompts)

        rows, rulings = iter(asked), []
        for question in questions:
            if question.first == question.second:
                found, truncated = [TIE] * len(principles), False
            else:
                row = next(rows)
                found = [orders(next(read), next(read)) for _ in row]
                truncated = any(each.truncated for each in row)
            verdicts = [Verdict(each, self.tie_band) for each in found]
            rulings.append(Ruling(dict(zip(principles, verdicts, strict=True)), truncated))
        return rulings

    async def rationale(
        self, question: Question, principle: Principle, verdict: Verdict, max_tokens: int
    ) -> AsyncGenerator[str, None]:
        """Why the verdict is what it is, piece by piece; the first response is called A.

        Identical responses have none.
        """
        if question.first == question.second:
            return
        asked = ask(self.tokenizer, question, principle, self.max_tokens)
        is_b = verdict.probability < 0.5
        decided = [*asked.prompts[0], label_ids(self.tokenizer, principle)[is_b]]
        self.usage.prompt_tokens += len(decided)
        begun = False
        async with aclosing(self.read_text(decided, max_tokens)) as pieces:
            async for text, tokens in pieces:
                self.usage.completion_tokens += tokens
                text = text if begun else text.lstrip(". \n")  # of the sentence that the label ends
                if text:
                    begun = True
                    yield text


def ask(
    tokenizer: ChatTokenizer, question: Question, principle: Principle, max_tokens: int
) -> Asked:
    """A question in both orders, shortened where it would have more than `max_tokens`."""

    def ids(asked: Question) -> tuple[list[int], list[int]]:
        return (
            judge_prompt_ids(tokenizer, asked, principle),
            judge_prompt_ids(tokenizer, asked.swapped, principle),
        )

    short = shorten(question, lambda asked: max(map(len, ids(asked))) <= max_tokens)
    return Asked(short, short is not question, ids(short))
