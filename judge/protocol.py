"""What a judge is to its callers: the server's judges implement it, and judges in a training process can.

A judge is made for one set of questions (a request, a comparison of methods): its principles are fixed, and `usage`
counts the tokens that it has read and written since.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from judge.prompts import Question
from judge.verdict import PairResult


@dataclass
class Usage:
    """Tokens spent on judging. A judgment reads its prompt and writes one token."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Usage") -> None:
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Judge(Protocol):
    """Compares pairs of responses."""

    @property
    def kind(self) -> str:
        """Such as `pairwise` or `reward`: the metrics are labelled with it."""
        ...

    @property
    def usage(self) -> Usage: ...

    async def compare(self, questions: Sequence[Question]) -> list[PairResult]:
        """One result a question, in the same order."""
        ...
