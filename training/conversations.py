"""Chats as token ids, as the server's chat template writes them."""

from collections.abc import Sequence
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from judge.messages import Message, as_texts
from judge.prompts import encode, split_ids
from training.console import TrainingError


class Conversations:
    """Turns chats into token ids, as the server does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise TrainingError("the model's tokenizer has no chat template; add one first")
        self.tokenizer = tokenizer

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of the assistant's turn."""
        return encode(self.tokenizer, self._text(messages, add_generation_prompt=True))

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with an answer."""
        return encode(self.tokenizer, self._text(messages, add_generation_prompt=False))

    def split_ids(
        self, prompt: Sequence[Message], response: str | Message
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids(prompt)`, and the token ids of the response after it, end of turn included."""
        turn = (
            Message(role="assistant", content=response) if isinstance(response, str) else response
        )
        return self.split_turns(prompt, [turn])

    def split_turns(
        self, prompt: Sequence[Message], turns: Sequence[Message]
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids(prompt)`, and the token ids of the turns after it, of which the assistant's is the first."""
        whole = self._text([*prompt, *turns], add_generation_prompt=False)
        parts = split_ids(self.tokenizer, self._text(prompt, add_generation_prompt=True), whole)
        if parts is None:
            raise TrainingError(
                "the chat template writes a conversation with an answer differently from one that awaits it; "
                "such a template cannot be trained on answer by answer"
            )
        return parts

    def as_given(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that the chat template supports.

        If the template has no developer role, developer and system messages are joined into one system message at the
        start, as vLLM does. If it does not write tool calls, they are written as text, as the judge reads them.
        """
        if not self._writes_calls and any("tool_calls" in message for message in messages):
            messages = as_texts(messages)
        roles = {message["role"] for message in messages}
        if "developer" not in roles or "developer" in str(self.tokenizer.chat_template):
            return list(messages)
        instructing = ("system", "developer")
        instructions = [m["content"] for m in messages if m["role"] in instructing and m["content"]]
        others = [message for message in messages if message["role"] not in instructing]
        return [Message(role="system", content="\n\n".join(instructions)), *others]

    @cached_property
    def _writes_calls(self) -> bool:
        """Whether the chat template writes tool calls."""
        function = {"name": "name_of_a_probe", "arguments": {}}
        call = {"id": "123456789", "type": "function", "function": function}
        asked = Message(role="user", content="x")
        called = Message(role="assistant", content="", tool_calls=[call])
        try:
            text = self.tokenizer.apply_chat_template([asked, called], tokenize=False)
        except TemplateError:
            return False
        return "name_of_a_probe" in text

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                self.as_given(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        # TypeError: the template computes with a missing value.
        except (TemplateError, TypeError) as error:
            raise TrainingError(
                f"the model's chat template refuses the conversation: {error}"
            ) from None
