"""Chat messages in all of OpenAI's forms, and values that are no chat messages."""

from typing import Any

import pytest

from judge.messages import Unusable, prompt_key, read_messages, text_of

CALL = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
NESTED = '{"x":' * 100 + "1" + "}" * 100
READ_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        (message("developer", "Be brief."), message("developer", "Be brief.")),
        (message("user", [{"type": "text", "text": "a"}, "b"]), message("user", "a\nb")),
        (message("user", "a", name=None, tool_calls=None, time=5), message("user", "a")),
        (message("assistant", "a", tool_calls=[]), message("assistant", "a")),
        (
            message("assistant", None, tool_calls=[CALL]),
            message("assistant", "", tool_calls=[READ_CALL]),
        ),
        (
            message("assistant", "", tool_calls=[{"name": "now", "arguments": None}]),
            message(
                "assistant",
                "",
                tool_calls=[{"type": "function", "function": {"name": "now", "arguments": {}}}],
            ),
        ),
        (
            message("tool", "sunny", tool_call_id="call-1", name="weather"),
            message("tool", "sunny", tool_call_id="call-1", name="weather"),
        ),
    ],
)
def test_all_forms_are_read(original: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_messages([original]) == [expected]
    assert read_messages(read_messages([original])) == [expected]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hello", "expected a list of chat messages"),
        (None, "expected a list"),
        ([], "expected a list"),
        (["hello"], "a message is"),
        ([{"content": "x"}], "role None is not one of"),
        ([message("user", None)], "content is null"),
        ([message("user", 5)], "neither a text nor a list of parts"),
        ([message("user", [{"type": "image_url", "image_url": {}}])], "content that is not text"),
        ([message("user", "\ud83d")], "half of a surrogate pair"),
        ([message("assistant", "", tool_calls="x")], "no function with a name"),
        ([message("assistant", "", tool_calls=5)], "tool_calls is not a list"),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])],
            "arguments of a tool call are not JSON",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "arguments of a tool call are no object",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}])],
            "half of a surrogate pair",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": "[" * 10**5}])],
            "arguments of a tool call are not JSON",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": NESTED}])],
            "nested too deeply",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}])],
            "a number is not one of JSON's",
        ),
        (
            [message("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": b"y"}}])],
            "a value is not one of JSON's",
        ),
    ],
)
def test_what_is_no_conversation(messages: Any, error: str) -> None:
    with pytest.raises(Unusable, match=error):
        read_messages(messages)


def test_calls_are_read_as_lines_of_json() -> None:
    (tool_message,) = read_messages([message("assistant", "Let me see.", tool_calls=[CALL])])
    assert (
        text_of(tool_message) == 'Let me see.\n{"name": "weather", "arguments": {"city": "Rome"}}'
    )
    assert text_of({"role": "user", "content": "Hello"}) == "Hello"


def test_a_prompt_is_known_again_whatever_its_form() -> None:
    forms: list[list[dict[str, Any]]] = [
        [message("user", "Is it  hot?\n")],
        [{"content": " Is it hot?", "role": "user", "name": None}],
        [message("user", [{"type": "text", "text": "Is it"}, {"type": "text", "text": "hot?"}])],
    ]
    call_forms: list[list[dict[str, Any]]] = [
        [message("assistant", "", tool_calls=[{"name": "f", "arguments": arguments}])]
        for arguments in (
            '{"at": "Rome  now", "in": 1}',
            {"in": 1, "at": "Rome now"},
            {"in": 1, "at": "Rome now", "of": None},
        )
    ]
    instruction_forms = [[message(role, "Be brief.")] for role in ("system", "developer")]
    for equal_forms in (forms, call_forms, instruction_forms):
        assert len({prompt_key(read_messages(form)) for form in equal_forms}) == 1
    other_forms = [[message("system", "Is it hot?")], [message("user", "Is it hot? Or cold?")]]
    assert len({prompt_key(read_messages(form)) for form in [*forms, *other_forms]}) == 3
