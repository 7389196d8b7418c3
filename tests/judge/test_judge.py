"""The judge before engines that the tests make up."""

import asyncio
import math

import pytest

from judge.judge import Judge
from judge.prompts import Message

PROMPT: list[Message] = [{"role": "user", "content": "Say something nice."}]


class Engine:
    """Reads labels from a judge prompt by a rule on the two responses' texts."""

    def __init__(self, tokenizer, probability_of_a):
        self.tokenizer = tokenizer
        self.probability_of_a = probability_of_a
        self.batches: list[list[str]] = []
        self.labels: list[tuple[int, int]] = []

    async def __call__(self, prompts, labels):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.batches.append(texts)
        self.labels.append(labels)
        found = []
        for text in texts:
            a, b = text.split("[Response A]\n")[1].split("<|end|>")[0].split("\n[Response B]\n")
            p = self.probability_of_a(a, b)
            found.append((math.log(p), math.log(1 - p)))
        return found


def compare(tokenizer, probability_of_a, pairs):
    engine = Engine(tokenizer, probability_of_a)
    judge = Judge(tokenizer, engine)
    return asyncio.run(judge.compare(PROMPT, pairs)), judge, engine


def test_prefers_the_longer_whatever_the_order(tokenizer):
    verdicts, _, _ = compare(
        tokenizer,
        lambda a, b: 0.9 if len(a) > len(b) else 0.2,
        [("You look well.", "Hm."), ("Hm.", "You look well.")],
    )
    assert [v.winner for v in verdicts] == ["a", "b"]
    # Longer first: p(A) = 0.9; longer second: p(B) = 1 - 0.2.
    assert verdicts[0].orders == pytest.approx((0.9, 0.8))
    assert verdicts[1].orders == pytest.approx((0.2, 0.1))


def test_position_bias_is_a_tie(tokenizer):
    (verdict,), _, _ = compare(tokenizer, lambda a, b: 0.99, [("x", "y")])
    assert verdict.winner == "tie"
    assert verdict.probability == pytest.approx(0.5)


def test_both_orders_of_all_pairs_go_in_one_batch(tokenizer):
    _, judge, engine = compare(tokenizer, lambda a, b: 0.6, [("x", "y"), ("u", "v")])
    (batch,) = engine.batches
    shown = [text.split("[Response A]\n")[1].split("<|end|>")[0] for text in batch]
    assert shown == [f"{a}\n[Response B]\n{b}" for a, b in ("xy", "yx", "uv", "vu")]
    assert judge.usage.prompt_tokens == sum(
        len(tokenizer.encode(text, add_special_tokens=False)) for text in batch
    )
    assert judge.usage.completion_tokens == 4


def test_the_engine_is_asked_for_the_labels_of_this_tokenizer(tokenizer):
    _, _, engine = compare(tokenizer, lambda a, b: 0.6, [("x", "y")])
    ((a, b),) = engine.labels
    assert (tokenizer.decode([a]), tokenizer.decode([b])) == (" A", " B")


def test_identical_responses_are_a_tie_without_a_call(tokenizer):
    verdicts, judge, engine = compare(tokenizer, lambda a, b: 0.9, [("x", "x"), ("y", "y")])
    assert [v.winner for v in verdicts] == ["tie", "tie"]
    assert engine.batches == []
    assert judge.usage.as_json() == {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
    }


def test_identical_pairs_keep_their_places(tokenizer):
    verdicts, _, engine = compare(
        tokenizer,
        lambda a, b: 0.9 if a < b else 0.1,
        [("x", "x"), ("a", "b"), ("y", "y"), ("d", "c")],
    )
    assert [v.winner for v in verdicts] == ["tie", "a", "tie", "b"]
    assert len(engine.batches[0]) == 4


def test_usage_adds_up_over_calls(tokenizer):
    judge = Judge(tokenizer, Engine(tokenizer, lambda a, b: 0.6))
    for _ in range(3):
        asyncio.run(judge.compare(PROMPT, [("x", "y")]))
    assert judge.usage.completion_tokens == 6
