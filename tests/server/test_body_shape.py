"""Which bodies are refused by their shape, without much time or memory."""

import json
import tracemalloc
from typing import Any

import pytest

from server.body_shape import (
    MAX_CONTAINERS,
    MAX_ITEMS,
    check_responses_items,
    check_shape,
    check_text,
)
from server.engine import VLLMValidationError

MESSAGE = {"role": "user", "content": "How do I look after my freezer?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def nested(depth: int) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for _ in range(depth - 1):
        body = {"a": body}
    return body


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [MESSAGE] * MAX_ITEMS},
        {"messages": [{"role": "user", "content": [IMAGE] * 100}] * 10},
        {"prompt": list(range(200_000))},
        {"prompt": ["a"] * 10_000},
        {"prompt": [[1, 2]] * MAX_ITEMS},
        {"logit_bias": {str(token): 1.0 for token in range(50_000)}},
        {"response_format": {"json_schema": nested(60)}},
        {"allowed_token_ids": list(range(100_000)), "stop": ["a"] * 4},
    ],
    ids=lambda body: next(iter(body), "empty"),
)
def test_what_honest_clients_send(body):
    check_shape(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{}] * (MAX_ITEMS + 1)}, "`messages` has 4,097 items; 4,096 are accepted"),
        ({"messages": [0] * 100_000}, "`messages` has 100,000 items"),
        ({"tools": [{}] * 5000}, "`tools` has 5,000 items"),
        ({"prompt": [1.5] * 5000}, "`prompt` has 5,000 items"),
        ({"prompt": [1] * 5000 + ["a"]}, "`prompt` has 5,001 items"),
        ({"prompt": [True] * 5000}, "`prompt` has 5,000 items"),
        ({"messages": [{"content": [{}] * 4000}] * 5}, "more than 16,384 objects and lists"),
        (nested(65), "nested more than 64 levels"),
    ],
)
def test_what_is_refused(body, message):
    with pytest.raises(VLLMValidationError, match=message):
        check_shape(body)


def test_the_number_of_objects_is_what_is_said():
    lists = [[[]] * 4000 for _ in range(4)]  # 16,004 containers in them, and four more around
    check_shape({"a": lists[0], "b": lists[1], "c": lists[2], "d": lists[3]})
    with pytest.raises(VLLMValidationError):
        check_shape({"a": [[] for _ in range(MAX_ITEMS)], "b": [lists, [[]] * 400]})
    assert MAX_CONTAINERS == 16_384


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud800"', '"😀"', '"\\ud7ff"'])
def test_escapes_that_are_text(text):
    content = b'{"stop": [' + text.encode() + b"]}"
    check_text(content, json.loads(content))


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\uDFFF"', '"a\\ude00\\ud83d"'])
@pytest.mark.parametrize("body", ['{{"stop": [{}]}}', '{{"a": {{"b": {}}}}}', "{{{}: 1}}"])
def test_half_of_a_surrogate_pair_is_no_text(body, text):
    content = body.format(text).encode()
    with pytest.raises(VLLMValidationError, match="half of a surrogate pair"):
        check_text(content, json.loads(content))


ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}


@pytest.mark.parametrize(
    "value",
    [
        "Hello",
        [{"role": "user", "content": "Hello"}] * 20,
        [ITEM, {"role": "assistant", "content": "Hi"}, ITEM],
    ],
    ids=["text", "easy", "typed"],
)
def test_items_of_responses_that_are_right(value):
    check_responses_items({"input": value})


@pytest.mark.parametrize("item", [[], {}, 0, {"type": "message"}, None], ids=str)
def test_the_first_wrong_item_of_responses_is_named(item):
    body = {"input": [ITEM, *[item] * 2000]}
    check_responses_items({"input": [ITEM]})  # the validator is made before the measurement
    tracemalloc.start()
    with pytest.raises(VLLMValidationError, match="`input`, item 1, is none of the kinds"):
        check_responses_items(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000  # validated as a whole they take 500 MB and more
    assert len(json.dumps(body)) < 100_000


def test_tools_of_responses():
    with pytest.raises(VLLMValidationError, match="`tools`, item 0"):
        check_responses_items({"input": "Hello", "tools": [{}] * 2000})
