"""The judge prompt: a chat whose next token, " A" or " B", is the verdict.

    system     the principle to judge by
    user       [Conversation] ... [Response A] ... [Response B] ...
    assistant  The better response is

The text that both orders of a pair share stands first, so that a prefix cache can serve it.
The trainer builds its judgment examples with these same functions.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

from jinja2 import TemplateError


class Message(TypedDict):
    role: str
    content: str


class JudgePromptError(ValueError):
    """This tokenizer or its chat template cannot carry a judgment."""


class ChatTokenizer(Protocol):
    """What the judge needs of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


PRINCIPLES: dict[str, str] = {
    "overall": (
        "Choose the better response: relevant, true to the conversation, safe, polite, complete."
    ),
}
DEFAULT_PRINCIPLE = "overall"

ANSWER_PREFIX = "The better response is"
LABELS = (" A", " B")


def judge_messages(
    prompt: Sequence[Message],
    response_a: str,
    response_b: str,
    principle: str = DEFAULT_PRINCIPLE,
) -> list[Message]:
    """The chat that asks which response is better; its last message is to be continued by a label.

    Raises KeyError for a principle that is not in PRINCIPLES.
    """
    conversation = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)
    question = (
        f"[Conversation]\n{conversation}\n[Response A]\n{response_a}\n[Response B]\n{response_b}"
    )
    return [
        {"role": "system", "content": PRINCIPLES[principle]},
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWER_PREFIX},
    ]


def judge_prompt_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the judge prompt, up to and including the assistant's prefix."""
    return _encode(tokenizer, _render(tokenizer, messages))


def label_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> tuple[int, int]:
    """The tokens that " A" and " B" really become when they follow this judge prompt.

    A tokenizer may merge or split text differently in context: labels are never looked up alone.
    Raises JudgePromptError if a label is not exactly one token, or both are the same one.
    """
    text = _render(tokenizer, messages)
    prompt_ids = _encode(tokenizer, text)
    found = []
    for label in LABELS:
        ids = _encode(tokenizer, text + label)
        if ids[:-1] != prompt_ids:
            raise JudgePromptError(
                f"this tokenizer does not write the label {label!r} as one token of its own after "
                f"{ANSWER_PREFIX!r}; such a model cannot judge"
            )
        found.append(ids[-1])
    if found[0] == found[1]:
        raise JudgePromptError(
            f"this tokenizer gives both labels {LABELS} the same token {found[0]}; "
            "such a model cannot judge"
        )
    return found[0], found[1]


def _render(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> str:
    options = {"tokenize": False, "continue_final_message": True}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError:
        pass
    # Gemma's template, for one, knows no system role: there the principle opens the question.
    system, user, answer = messages
    question = Message(role="user", content=f"{system['content']}\n\n{user['content']}")
    try:
        return tokenizer.apply_chat_template([question, answer], **options)
    except TemplateError as error:
        raise JudgePromptError(
            f"the chat template refuses a judgment ({error}); such a model cannot judge"
        ) from None


def _encode(tokenizer: ChatTokenizer, text: str) -> list[int]:
    # The template has written every special token already.
    return list(tokenizer.encode(text, add_special_tokens=False))
