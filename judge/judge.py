"""The judge as a client of some engine: pairs of responses in, verdicts out.

One Judge serves one request; `usage` counts the tokens that request spent on judging.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from judge.prompts import (
    DEFAULT_PRINCIPLE,
    ChatTokenizer,
    Message,
    judge_messages,
    judge_prompt_ids,
    label_ids,
)
from judge.verdict import TIE, Verdict, verdict

ReadLabels = Callable[[list[list[int]], tuple[int, int]], Awaitable[list[tuple[float, float]]]]
"""(each prompt's token ids, ids of " A" and " B") -> both labels' next-token logprobs, for each."""


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


class Judge:
    def __init__(self, tokenizer: ChatTokenizer, read_labels: ReadLabels) -> None:
        self.tokenizer = tokenizer
        self.read_labels = read_labels
        self.usage = Usage()

    async def compare(
        self,
        prompt: Sequence[Message],
        pairs: Sequence[tuple[str, str]],
        principle: str = DEFAULT_PRINCIPLE,
    ) -> list[Verdict]:
        """Every pair in both orders, in one batch. Identical responses tie and cost nothing.

        Raises JudgePromptError where the tokenizer cannot carry a judgment, and whatever
        `read_labels` raises.
        """
        different = [pair for pair in pairs if pair[0] != pair[1]]
        read = iter(await self._compare_different(prompt, different, principle))
        return [TIE if first == second else next(read) for first, second in pairs]

    async def _compare_different(
        self, prompt: Sequence[Message], pairs: Sequence[tuple[str, str]], principle: str
    ) -> list[Verdict]:
        if not pairs:
            return []
        chats = [
            judge_messages(prompt, *shown, principle)
            for first, second in pairs
            for shown in ((first, second), (second, first))
        ]
        prompts = [judge_prompt_ids(self.tokenizer, chat) for chat in chats]
        # All chats end in the same prefix, so the labels' tokens are the same after each.
        logprobs = await self.read_labels(prompts, label_ids(self.tokenizer, chats[0]))
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.completion_tokens += len(prompts)
        return [verdict(*both) for both in zip(logprobs[::2], logprobs[1::2], strict=True)]
