"""The judge prompt: a chat whose next token, " A" or " B", is the verdict, followed by the reasons.

    system     the principle to judge by
    user       [Conversation] ... [Response A] ... [Response B] ...
    assistant  The better response is A.
               A: ...
               B: ...

The decision comes before its reasons, so a judgment costs one token, and the reasons are generated only on request.
The trainer builds its judgment examples with the same functions.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from jinja2 import TemplateError

from judge.messages import Message, text_of
from judge.principles import Principle

LABELS = (" A", " B")
CUT = " ..."
"""Marks the end of a text that was cut."""
MARK_LEFT_OUT = "…"
MAX_TOKEN_CHARS = 64
"""Characters a token of a text, on average, beyond which it is shortened unread. Languages have 1 to 6."""


class Question(NamedTuple):
    """Which response to the conversation is better?"""

    prompt: Sequence[Message]
    first: str
    second: str

    @property
    def swapped(self) -> "Question":
        """The same question with the responses in the other order."""
        return self._replace(first=self.second, second=self.first)

    @property
    def responses(self) -> tuple[str, ...]:
        return self.first, self.second

    def having(self, prompt: Sequence[Message], responses: Sequence[str]) -> "Question":
        """The same question about other texts."""
        return Question(prompt, *responses)


class Choice(NamedTuple):
    """Which of several responses to the conversation is best?"""

    prompt: Sequence[Message]
    responses: tuple[str, ...]

    def having(self, prompt: Sequence[Message], responses: Sequence[str]) -> "Choice":
        """The same choice among other texts."""
        return Choice(prompt, tuple(responses))


Asked = TypeVar("Asked", Question, Choice)


class JudgePromptError(ValueError):
    """This tokenizer or its chat template cannot carry a judgment."""


class TooLong(JudgePromptError):
    """The principle alone is longer than the model's context."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the judge uses."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """By id, the tokens that are found in a text before it is split: `content` is the text of each."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def judge_messages(question: Question, principle: Principle) -> list[Message]:
    """The chat that asks which response is better; its last message is to be continued by a label."""
    text = principle.question.format(
        conversation=conversation_text(question.prompt),
        response_a=question.first,
        response_b=question.second,
    )
    return [
        {"role": "system", "content": principle.system},
        {"role": "user", "content": text},
        {"role": "assistant", "content": principle.answer},
    ]


def conversation_text(prompt: Sequence[Message]) -> str:
    """The turns as the judge prompt shows them."""
    return "\n".join(f"{turn['role'].capitalize()}: {text_of(turn)}" for turn in prompt)


def judge_prompt_ids(
    tokenizer: ChatTokenizer, question: Question, principle: Principle
) -> list[int]:
    """Token ids of the judge prompt, up to and including the assistant's prefix."""
    return encode(tokenizer, render(tokenizer, judge_messages(question, principle)))


def without_marks(
    tokenizer: ChatTokenizer, question: Asked, section_headings: Sequence[str]
) -> Asked:
    """The question with texts that cannot end their section of the judge prompt, or its message.

    Control tokens and headings of the prompt's sections are replaced by `MARK_LEFT_OUT`, which joins what is around
    it to no other mark. Headings may be words of an honest text, so one that begins with a letter counts only at the
    beginning of a line, and one that ends with a letter only at its end.
    """
    tokens = tokenizer.added_tokens_decoder.values()
    control_tokens = [token.content for token in tokens if token.special]
    headings = [
        re.compile(
            (r"^[ \t]*" if heading[0].isalnum() else "")
            + re.escape(heading)
            + (r"[ \t]*$" if heading[-1].isalnum() else ""),
            re.IGNORECASE | re.MULTILINE,
        )
        for heading in section_headings
    ]

    def clean(text: str) -> str:
        for token in control_tokens:
            text = text.replace(token, MARK_LEFT_OUT)
        for heading in headings:
            text = heading.sub(MARK_LEFT_OUT, text)
        return text

    turns = [Message(role=turn["role"], content=clean(text_of(turn))) for turn in question.prompt]
    return question.having(turns, [clean(text) for text in question.responses])


def label_ids(tokenizer: ChatTokenizer, principle: Principle) -> tuple[int, int]:
    """The tokens of " A" and " B" after a judge prompt; all prompts end with the same text.

    A tokenizer may merge or split text differently in context, so labels are never encoded alone.
    Raises JudgePromptError if a label is not exactly one token, or both are the same one.
    """
    text = render(tokenizer, judge_messages(Question([], "", ""), principle))
    prompt_ids = encode(tokenizer, text)
    labels = []
    for label in LABELS:
        token = label_id(tokenizer, text, prompt_ids, label)
        if token is None:
            raise JudgePromptError(
                f"this tokenizer does not write the label {label!r} as one token of its own after "
                f"{principle.answer!r}; such a model cannot judge"
            )
        labels.append(token)
    if labels[0] == labels[1]:
        raise JudgePromptError(
            f"this tokenizer gives both labels {LABELS} the same token {labels[0]}; "
            "such a model cannot judge"
        )
    return labels[0], labels[1]


def label_id(tokenizer: ChatTokenizer, text: str, prompt_ids: list[int], label: str) -> int | None:
    """The token of a label after a text with these ids; None = it is not one token of its own there."""
    ids = encode(tokenizer, text + label)
    return ids[-1] if ids[:-1] == prompt_ids else None


def rationale_text(reason_a: str, reason_b: str) -> str:
    """The text after the label of a judgment with reasons."""
    return f".\nA: {reason_a}\nB: {reason_b}"


def rationale_ids(
    tokenizer: ChatTokenizer, principle: Principle, label: int, text: str
) -> list[int]:
    """The tokens of a rationale and of the end of the turn, which follow LABELS[label].

    Raises JudgePromptError for a template that does not write a message as it begins one.
    """
    messages = judge_messages(Question([], "", ""), principle)
    begun = render(tokenizer, messages) + LABELS[label]
    messages[-1]["content"] += LABELS[label] + text
    whole = render(tokenizer, messages, continue_final_message=False)
    if not whole.startswith(begun + text):
        raise JudgePromptError(
            "the chat template changes an assistant's message; such a model cannot learn rationales"
        )
    return encode(tokenizer, whole.removeprefix(begun))


def response_ids(
    tokenizer: ChatTokenizer, prompt: Sequence[Message], response: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation without its answer, and of the answer with the end of the turn.

    Raises JudgePromptError for a template that refuses the conversation, or renders it differently with its answer.
    """
    answered = [*prompt, Message(role="assistant", content=response)]
    try:
        begun, whole = (
            tokenizer.apply_chat_template(chat, tokenize=False, **options)
            for chat, options in (
                (list(prompt), {"add_generation_prompt": True}),
                (answered, {"add_generation_prompt": False}),
            )
        )
    except TemplateError as error:
        raise JudgePromptError(f"the chat template refuses the conversation: {error}") from None
    parts = split_ids(tokenizer, begun, whole)
    if parts is None:
        raise JudgePromptError(
            "the chat template writes a conversation with an answer differently from one that awaits it; such a model "
            "cannot score answers"
        )
    return parts


def split_ids(
    tokenizer: ChatTokenizer, begun: str, whole: str
) -> tuple[list[int], list[int]] | None:
    """The tokens of a text's beginning, and those that follow; None = it begins otherwise.

    A token may reach over the border: a template's newline and the spaces that an answer begins with. Then the rest is
    encoded by itself, for an LLM that answers starts at the border too.
    """
    begun_ids, whole_ids = encode(tokenizer, begun), encode(tokenizer, whole)
    if whole_ids[: len(begun_ids)] == begun_ids:
        return begun_ids, whole_ids[len(begun_ids) :]
    if whole.startswith(begun):
        return begun_ids, encode(tokenizer, whole.removeprefix(begun))
    return None


def up_to_end(response: list[int], end_ids: Collection[int]) -> list[int]:
    """The response up to the first token that ends a turn. The LLM does not generate what a chat template adds then."""
    end = next((i for i, token in enumerate(response) if token in end_ids), len(response) - 1)
    return response[: end + 1]


def shorten(question: Asked, fits: Callable[[Asked], bool], max_tokens: int) -> Asked:
    """The question, shortened until it fits; training and serving shorten alike.

    First the oldest turns are dropped, as few as possible, but never the last. If that is not enough, the last turn and
    the responses are cut at their ends, all of them to the same number of characters: the largest that fits. A cut text
    ends in `CUT`.

    Both limits are found by doubling and bisection from the short side, so that a text far beyond the limit is never
    tokenized: the work grows with `max_tokens` and the logarithm of the text.

    Args:
        question: the whole question
        fits: whether a question is short enough, whatever its order
        max_tokens: the limit of `fits`. More than `MAX_TOKEN_CHARS` times as many characters do not fit.

    Raises:
        TooLong: it does not fit even without a character of the last turn and the responses.
    """

    def is_short(candidate: Asked) -> bool:
        texts = *candidate.responses, *(text_of(turn) for turn in candidate.prompt)
        return sum(map(len, texts)) <= MAX_TOKEN_CHARS * max_tokens and fits(candidate)

    if is_short(question):
        return question

    def recent(count: int) -> Asked:
        turns = question.prompt[len(question.prompt) - count :]
        return question.having(turns, question.responses)

    turns = _largest(1, len(question.prompt) - 1, lambda count: is_short(recent(count)))
    if turns is not None:
        return recent(turns)
    last: Sequence[Message] = question.prompt[-1:]

    def cut(length: int) -> Asked:
        prompt = [Message(role=m["role"], content=_cut(text_of(m), length)) for m in last]
        return question.having(prompt, [_cut(text, length) for text in question.responses])

    longest = max(map(len, (*question.responses, *map(text_of, last))))
    length = _largest(0, longest - 1, lambda count: is_short(cut(count)))
    if length is None:
        raise TooLong("the principle alone is longer than the model's context: shorten it")
    return cut(length)


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from low to high for which `holds` is true, if it is true up to there; None where it never is.

    Numbers of more than about twice the result are not tried.
    """
    if low > high or not holds(low):
        return None
    step = 1
    while low + step <= high and holds(low + step):
        low, step = low + step, 2 * step
    # Invariant of the bisection: holds(low), and not holds(high) where high was tried.
    high = min(high + 1, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + CUT


def render(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, continue_final_message: bool = True
) -> str:
    """The chat as text; the last message is to be continued, unless it is said that it is whole."""
    options = {"tokenize": False, "continue_final_message": continue_final_message}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError:
        pass
    # Some templates, such as Gemma's, have no system role: the principle goes before the question.
    system, user, answer = messages
    question = Message(role="user", content=f"{system['content']}\n\n{user['content']}")
    try:
        return tokenizer.apply_chat_template([question, answer], **options)
    except TemplateError as error:
        raise JudgePromptError(
            f"the chat template refuses a judgment ({error}); such a model cannot judge"
        ) from None


def encode(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The tokens of a text in which the template has written all special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))
