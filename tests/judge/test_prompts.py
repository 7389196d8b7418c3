"""The judge prompt as text and as tokens."""

import copy

import pytest

from judge.prompts import (
    PRINCIPLES,
    JudgePromptError,
    Message,
    judge_messages,
    judge_prompt_ids,
    label_ids,
)

PROMPT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def test_messages():
    system, user, assistant = judge_messages(PROMPT, "Four.", "Five.")
    assert system == {"role": "system", "content": PRINCIPLES["overall"]}
    assert user == {
        "role": "user",
        "content": "[Conversation]\nSystem: Be brief.\nUser: What is 2 + 2?\n"
        "[Response A]\nFour.\n[Response B]\nFive.",
    }
    assert assistant == {"role": "assistant", "content": "The better response is"}


def test_both_orders_begin_alike():
    def text(first, second):
        return judge_messages(PROMPT, first, second)[1]["content"]

    shared = "[Conversation]\nSystem: Be brief.\nUser: What is 2 + 2?\n[Response A]\n"
    assert text("x", "y").startswith(shared)
    assert text("y", "x").startswith(shared)


def test_an_unknown_principle():
    with pytest.raises(KeyError, match="loudness"):
        judge_messages(PROMPT, "a", "b", "loudness")


def test_the_prompt_ends_where_the_label_begins(tokenizer):
    messages = judge_messages(PROMPT, "Four.", "Five.")
    text = tokenizer.decode(judge_prompt_ids(tokenizer, messages))
    assert text.startswith(f"<|system|>{PRINCIPLES['overall']}<|end|><|user|>[Conversation]")
    assert text.endswith("[Response B]\nFive.<|end|><|assistant|>The better response is")


def test_labels_are_the_tokens_that_follow_the_prompt(tokenizer):
    messages = judge_messages(PROMPT, "Four.", "Five.")
    a, b = label_ids(tokenizer, messages)
    assert (tokenizer.decode([a]), tokenizer.decode([b])) == (" A", " B")


def test_a_label_of_two_tokens_is_an_error(bytes_only_tokenizer):
    with pytest.raises(JudgePromptError, match="' A' as one token"):
        label_ids(bytes_only_tokenizer, judge_messages(PROMPT, "a", "b"))


class UnknownWords:
    """A word tokenizer to which both labels are the unknown word."""

    def apply_chat_template(self, conversation, **options):
        return " ".join(message["content"] for message in conversation)

    def encode(self, text, *, add_special_tokens):
        return [{"A": 1, "B": 1}.get(word, 0) for word in text.split()]


def test_labels_that_are_the_same_token_are_an_error():
    with pytest.raises(JudgePromptError, match="the same token 1"):
        label_ids(UnknownWords(), judge_messages(PROMPT, "a", "b"))


@pytest.fixture
def refusing(tokenizer, request):
    """A tokenizer whose chat template refuses one of the roles."""
    refused = copy.deepcopy(tokenizer)
    refused.chat_template = (
        "{% for m in messages if m['role'] == '" + request.param + "' %}"
        "{{ raise_exception('no such role') }}{% endfor %}" + tokenizer.chat_template
    )
    return refused


@pytest.mark.parametrize("refusing", ["system"], indirect=True)
def test_without_a_system_role_the_principle_opens_the_question(refusing):
    messages = judge_messages(PROMPT, "Four.", "Five.")
    text = refusing.decode(judge_prompt_ids(refusing, messages))
    principle = PRINCIPLES["overall"]
    assert text.startswith(f"<|user|>{principle}\n\n[Conversation]\nSystem: Be brief.\n")
    assert text.endswith("[Response B]\nFive.<|end|><|assistant|>The better response is")
    assert [refusing.decode([label]) for label in label_ids(refusing, messages)] == [" A", " B"]


@pytest.mark.parametrize("refusing", ["assistant"], indirect=True)
def test_a_template_that_refuses_a_judgment(refusing):
    with pytest.raises(JudgePromptError, match=r"refuses a judgment \(no such role\)"):
        judge_prompt_ids(refusing, judge_messages(PROMPT, "a", "b"))
