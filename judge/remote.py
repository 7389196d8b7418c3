"""Judges whose model is on another server: a reward model scores each response, or an LLM names the better of two.

They know no protocol: their user passes a function that sends the chats. The other model's tokenizer is not here, so
texts are measured, and shortened, by the hosted LLM's.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from judge.messages import Message
from judge.pairwise import EncodedQuestion, encode_question, pair_results
from judge.principles import Principle
from judge.prompts import LABELS, ChatTokenizer, Question, judge_messages
from judge.protocol import Usage
from judge.scoring import Answer, ScoringJudge
from judge.verdict import PairResult

CONTINUE = 'Continue "{answer}" with one letter, A or B, and write nothing else.'
"""Ends the question where the other server does not continue an assistant's message."""


class Chat(NamedTuple):
    """What the other model is to read."""

    messages: list[Message]
    num_tokens: int
    """By the hosted LLM's tokenizer."""


ReadRewards = Callable[[list[Chat]], Awaitable[list[tuple[float, Usage]]]]
"""Conversations with their response as the last message -> the reward of each, and the tokens that it took."""

ReadLabels = Callable[[list[Chat]], Awaitable[list[tuple[tuple[float, float], Usage]]]]
"""Judge prompts -> the next token's log-probability of " A" and " B" after each (`label_logprobs`), and the tokens."""


class RewardJudge(ScoringJudge):
    """The score of a reward model. A Bradley–Terry model's is used as it is: β = 1.

    Args:
        tokenizer: the hosted LLM's
        read_rewards: asks the reward model
        beta, max_tokens, tie_band: as of ScoringJudge
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        read_rewards: ReadRewards,
        *,
        beta: float,
        max_tokens: int,
        tie_band: float = 0.0,
    ) -> None:
        super().__init__(
            tokenizer, kind="reward", beta=beta, max_tokens=max_tokens, tie_band=tie_band
        )
        self.read_rewards = read_rewards

    async def read(self, answers: Sequence[Answer]) -> list[float]:
        """As of ScoringJudge."""
        chats = [
            Chat([*prompt, Message(role="assistant", content=text)], sum(map(len, reading)))
            for prompt, text, reading in answers
        ]
        rewards = await self.read_rewards(chats)
        for _, usage in rewards:
            self.usage.add(usage)
        return [reward for reward, _ in rewards]


class EndpointJudge:
    """An LLM behind an OpenAI-compatible API, asked as `PairwiseJudge` asks: the probability of A in both orders.

    Args:
        tokenizer: the hosted LLM's
        principles: what to judge by, by name
        read_labels: asks the other LLM
        continues: whether its server continues the last message; if not, the question ends with `CONTINUE`
        max_tokens: limit of a judge prompt
        tie_band: see Verdict
    """

    kind = "endpoint"

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        principles: Mapping[str, Principle],
        read_labels: ReadLabels,
        *,
        continues: bool,
        max_tokens: int,
        tie_band: float = 0.0,
    ) -> None:
        self.tokenizer, self.principles = tokenizer, principles
        self.read_labels, self.continues = read_labels, continues
        self.max_tokens, self.tie_band = max_tokens, tie_band
        self.usage = Usage()

    async def compare(self, questions: Sequence[Question]) -> list[PairResult]:
        """Judge every question by every principle in both orders; identical responses tie and cost nothing."""
        differing = [question for question in questions if question.first != question.second]
        encoded, chats = [], []
        for question in differing:
            # In a thread, as in `PairwiseJudge`.
            row = await asyncio.to_thread(self._encode, question)
            encoded.append([entry for entry, _ in row])
            chats += [chat for _, pair in row for chat in pair]
        reads = await self.read_labels(chats) if chats else []
        for _, usage in reads:
            self.usage.add(usage)
        logprobs = (pair for pair, _ in reads)
        return pair_results(questions, encoded, logprobs, self.principles, self.tie_band)

    def _encode(self, question: Question) -> list[tuple[EncodedQuestion, list[Chat]]]:
        """By each principle, as shortened, and what to send for both orders."""
        rows = []
        for principle in self.principles.values():
            ending = "" if self.continues else "\n\n" + CONTINUE.format(answer=principle.answer)
            room = len(self.tokenizer.encode(ending, add_special_tokens=False))
            encoded = encode_question(self.tokenizer, question, principle, self.max_tokens - room)
            orders = encoded.question, encoded.question.swapped
            chats = [
                Chat(_with_ending(judge_messages(ordered, principle), ending), len(prompt) + room)
                for ordered, prompt in zip(orders, encoded.prompts, strict=True)
            ]
            rows.append((encoded, chats))
        return rows


def _with_ending(messages: list[Message], ending: str) -> list[Message]:
    """The judge prompt; with an ending it goes to the question, and nothing is to be continued."""
    if not ending:
        return messages
    system, user, _ = messages
    return [system, Message(role="user", content=f"{user['content']}{ending}")]


def label_logprobs(candidates: Iterable[tuple[str, float]]) -> tuple[float, float]:
    """Log-probability of each label among the next token's likeliest candidates, with and without space around.

    A label that is not among them, while the other is, has at most that of the least likely one, and gets it. -inf =
    neither label is there.

    Args:
        candidates: text and log-probability of each, in nats.
    """
    labels, least = dict.fromkeys((label.strip() for label in LABELS), 0.0), math.inf
    for text, logprob in candidates:
        least = min(least, logprob)
        if text.strip() in labels:
            labels[text.strip()] += math.exp(logprob)
    if not any(labels.values()):
        return -math.inf, -math.inf
    first, second = (math.log(value) if value > 0 else least for value in labels.values())
    return first, second
