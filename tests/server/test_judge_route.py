"""POST /judge."""

import json
import re

import pytest

from judge.tournament import replay
from tests.server.conftest import ROUNDING


def judge(http, **body):
    answer = http.post("/judge", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


PAIR = {"response_a": "Clean it once a week, please.", "response_b": "No."}
SWAPPED = {"response_a": PAIR["response_b"], "response_b": PAIR["response_a"]}
CLEAR = {"response_a": "To look after your freezer, pull the plug first.", "response_b": "Go."}
QUESTION = "How do I look after my freezer?"


def test_a_verdict_in_both_orders(http):
    verdict = judge(http, prompt=QUESTION, **PAIR)
    assert set(verdict) == {
        "winner",
        "probability",
        "orders",
        "consistent",
        "truncated",
        "principles",
        "usage",
    }
    first, second = verdict["orders"]
    assert verdict["probability"] == pytest.approx((first + second) / 2)
    assert verdict["consistent"] == ((first > 0.5) == (second > 0.5))
    assert verdict["winner"] == (
        "tie" if not verdict["consistent"] else "a" if first > 0.5 else "b"
    )
    assert verdict["principles"] == {
        "overall": {key: verdict[key] for key in ("winner", "probability", "orders", "consistent")}
    }
    assert verdict["usage"]["completion_tokens"] == 2
    assert verdict["usage"]["total_tokens"] == verdict["usage"]["prompt_tokens"] + 2


def test_swapping_the_responses_swaps_the_verdict(http):
    verdict, swapped = judge(http, prompt=QUESTION, **PAIR), judge(http, prompt=QUESTION, **SWAPPED)
    assert swapped["probability"] == pytest.approx(1 - verdict["probability"], abs=ROUNDING)
    assert swapped["winner"] == {"a": "b", "b": "a", "tie": "tie"}[verdict["winner"]]


def test_messages_and_prompt_mean_the_same(http):
    by_prompt = judge(http, prompt=QUESTION, **PAIR)
    by_messages = judge(http, messages=[{"role": "user", "content": QUESTION}], **PAIR)
    assert by_messages["orders"] == pytest.approx(by_prompt["orders"], abs=ROUNDING)


def test_the_conversation_is_read(http):
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Which freezer?"},
        {"role": "user", "content": "The old one."},
    ]
    num_tokens = judge(http, messages=turns, **PAIR)["usage"]["prompt_tokens"]
    assert num_tokens > judge(http, prompt=QUESTION, **PAIR)["usage"]["prompt_tokens"]


def test_identical_responses_cost_nothing(http):
    verdict = judge(http, prompt=QUESTION, response_a="Yes.", response_b="Yes.")
    assert (verdict["winner"], verdict["probability"], verdict["consistent"]) == ("tie", 0.5, True)
    assert verdict["usage"]["total_tokens"] == 0


def test_principles_can_be_named(http):
    verdict = judge(http, prompt=QUESTION, principles=["overall"], **PAIR)
    assert list(verdict["principles"]) == ["overall"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi."}]}, "either prompt or messages"),
        ({"prompt": None}, "either prompt or messages"),
        ({"response_b": None}, "response_b"),
        ({"principles": []}, "principles"),
        ({"principles": ["loudness"]}, "loudness"),
        ({"principles": ["overall", "overall"]}, "twice"),
        ({"temperature": 1}, "temperature"),
        ({"prompt": 5}, "prompt"),
        ({"tie_band": 0.6}, "tie_band"),
        ({"pairs": [{"prompt": "Hi.", **PAIR}]}, "one pair or pairs"),
        ({"stream": True}, "stream needs rationale"),
        ({"max_rationale_tokens": 0}, "max_rationale_tokens"),
    ],
)
def test_bad_requests(http, change, message):
    answer = http.post("/judge", json={"prompt": QUESTION} | PAIR | change)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert judge(http, prompt=QUESTION, **PAIR)["winner"] in ("a", "b", "tie")


def test_what_is_too_long_is_cut(http):
    verdict = judge(http, prompt="word " * 3000, **PAIR)
    assert verdict["truncated"]
    assert verdict["usage"]["prompt_tokens"] == pytest.approx(2 * 1023, abs=4)
    assert not judge(http, prompt=QUESTION, **PAIR)["truncated"]


def test_the_tie_band(http):
    verdict = judge(http, prompt=QUESTION, **CLEAR)
    margin = verdict["probability"] - 0.5
    assert verdict["winner"] == "a" and 0.05 < margin < 0.4999
    for tie_band, winner in ((margin * 0.99, "a"), (margin * 1.0001, "tie")):
        assert judge(http, prompt=QUESTION, tie_band=tie_band, **CLEAR)["winner"] == winner


def test_many_pairs_at_once(http):
    prompts = {"prompt": QUESTION}, {"messages": [{"role": "user", "content": "Hi."}]}
    pairs = [{**prompts[0], **PAIR}, {**prompts[0], **SWAPPED}, {**prompts[1], **PAIR}]
    answer = judge(http, pairs=pairs)
    single_verdicts = [judge(http, **pair) for pair in pairs]
    for batched, single in zip(answer["verdicts"], single_verdicts, strict=True):
        assert batched["orders"] == pytest.approx(single["orders"], abs=ROUNDING)
        assert batched["winner"] == single["winner"]
    total = sum(single["usage"]["total_tokens"] for single in single_verdicts)
    assert answer["usage"]["total_tokens"] == total


def events(http, **body):
    with http.stream("POST", "/judge", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_rationale_whole_and_streamed(http):
    body = {"prompt": QUESTION, **PAIR, "rationale": True, "max_rationale_tokens": 20}
    answer = judge(http, **body)
    text = answer["principles"]["overall"]["rationale"]
    assert text
    without_rationale = judge(http, prompt=QUESTION, **PAIR)
    assert answer["orders"] == pytest.approx(without_rationale["orders"], abs=ROUNDING)
    # The rationale reads the first prompt again with the label, and writes 20 tokens at most.
    num_written = (
        answer["usage"]["completion_tokens"] - without_rationale["usage"]["completion_tokens"]
    )
    assert 0 < num_written <= 20
    first, *pieces, last = events(http, **body, stream=True)
    assert first["object"] == "judge.verdict" and first["winner"] == answer["winner"]
    assert {piece["object"] for piece in pieces} == {"judge.rationale"}
    assert "".join(piece["delta"] for piece in pieces) == text
    assert last == {"object": "judge.usage", "usage": answer["usage"]}


def test_identical_responses_have_no_rationale(http):
    verdict = judge(http, prompt=QUESTION, response_a="Yes.", response_b="Yes.", rationale=True)
    assert verdict["principles"]["overall"]["rationale"] == ""
    assert verdict["usage"]["total_tokens"] == 0


RESPONSES = ["Clean it.", "No.", "Clean your freezer once a week, please.", "freezer freezer"]


@pytest.mark.parametrize(
    ("strategy", "comparisons"), [("knock-out", 3), ("final-four", 6), ("round-robin", 6)]
)
def test_rank(http, strategy, comparisons):
    body = {"prompt": QUESTION, "responses": RESPONSES, "strategy": strategy, "seed": 5}
    answer = http.post("/judge/rank", json=body)
    assert answer.status_code == 200, answer.text
    record = answer.json()
    assert sorted(record["ranking"]) == [0, 1, 2, 3]
    assert record["winner"] == record["ranking"][0]
    assert sum(map(len, record["rounds"])) == comparisons
    assert record["usage"]["completion_tokens"] == 2 * comparisons
    assert replay(record) == record["ranking"]
    second_record = http.post("/judge/rank", json=body).json()
    assert second_record["ranking"] == record["ranking"]
    # The ranking was made of the verdicts of /judge.
    comparison = record["rounds"][0][0]
    a, b = (RESPONSES[i] for i in comparison["pair"])
    verdict = judge(http, prompt=QUESTION, response_a=a, response_b=b)
    assert comparison["orders"]["overall"] == pytest.approx(verdict["orders"], abs=ROUNDING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": []}, "responses"),
        ({"responses": ["x"] * 65}, "responses"),
        ({"strategy": "coin"}, "strategy"),
        ({"seed": -1}, "seed"),
        ({"prompt": None}, "either prompt or messages"),
        ({"principles": ["loudness"]}, "unknown principle"),
    ],
)
def test_bad_rankings(http, change, message):
    answer = http.post("/judge/rank", json={"prompt": QUESTION, "responses": RESPONSES} | change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_calibration_is_watched(http):
    judge(http, prompt=QUESTION, **CLEAR)
    text = http.get("/metrics").text
    for name in ("flip", "tie", "longer"):
        line = re.search(rf'assent_judge_{name}_rate{{judge="pairwise"}} (\S+)', text)
        assert line and 0 <= float(line[1]) <= 1
