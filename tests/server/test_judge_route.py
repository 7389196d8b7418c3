"""POST /judge."""

import pytest


def judge(http, **body):
    answer = http.post("/judge", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


PAIR = {"response_a": "Clean it once a week, please.", "response_b": "No."}
SWAPPED = {"response_a": PAIR["response_b"], "response_b": PAIR["response_a"]}
QUESTION = "How do I look after my freezer?"


def test_a_verdict_in_both_orders(http):
    found = judge(http, prompt=QUESTION, **PAIR)
    assert set(found) == {
        "winner",
        "probability",
        "orders",
        "consistent",
        "principles",
        "usage",
    }
    first, second = found["orders"]
    assert found["probability"] == pytest.approx((first + second) / 2)
    assert found["consistent"] == ((first > 0.5) == (second > 0.5))
    assert found["winner"] == ("tie" if not found["consistent"] else "a" if first > 0.5 else "b")
    assert found["principles"] == {
        "overall": {key: found[key] for key in ("winner", "probability", "orders", "consistent")}
    }
    assert found["usage"]["completion_tokens"] == 2
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 2


def test_swapping_the_responses_swaps_the_verdict(http):
    found, swapped = judge(http, prompt=QUESTION, **PAIR), judge(http, prompt=QUESTION, **SWAPPED)
    assert swapped["probability"] == pytest.approx(1 - found["probability"], abs=1e-6)
    assert swapped["winner"] == {"a": "b", "b": "a", "tie": "tie"}[found["winner"]]


def test_messages_and_prompt_mean_the_same(http):
    by_prompt = judge(http, prompt=QUESTION, **PAIR)
    by_messages = judge(http, messages=[{"role": "user", "content": QUESTION}], **PAIR)
    assert by_messages["orders"] == pytest.approx(by_prompt["orders"], abs=1e-6)


def test_the_conversation_is_read(http):
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Which freezer?"},
        {"role": "user", "content": "The old one."},
    ]
    longer = judge(http, messages=turns, **PAIR)["usage"]["prompt_tokens"]
    assert longer > judge(http, prompt=QUESTION, **PAIR)["usage"]["prompt_tokens"]


def test_identical_responses_cost_nothing(http):
    found = judge(http, prompt=QUESTION, response_a="Yes.", response_b="Yes.")
    assert (found["winner"], found["probability"], found["consistent"]) == ("tie", 0.5, True)
    assert found["usage"]["total_tokens"] == 0


def test_principles_can_be_named(http):
    found = judge(http, prompt=QUESTION, principles=["overall"], **PAIR)
    assert list(found["principles"]) == ["overall"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": [{"role": "user", "content": "Hi."}]}, "either prompt or messages"),
        ({"prompt": None}, "either prompt or messages"),
        ({"response_b": None}, "response_b"),
        ({"principles": []}, "principles"),
        ({"principles": ["loudness"]}, "loudness"),
        ({"principles": ["overall", "overall"]}, "twice"),
        ({"temperature": 1}, "temperature"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "word " * 2000}, "1024"),
    ],
)
def test_bad_requests(http, change, said):
    answer = http.post("/judge", json={"prompt": QUESTION} | PAIR | change)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert judge(http, prompt=QUESTION, **PAIR)["winner"] in ("a", "b", "tie")


def test_too_long_says_how_long(http):
    answer = http.post("/judge", json={"prompt": "word " * 3000} | PAIR)
    message = answer.json()["error"]["message"]
    tokens = next(int(word) for word in message.split() if word.isdigit())
    assert tokens > 3000
