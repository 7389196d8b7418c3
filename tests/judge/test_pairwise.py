"""The pairwise judge with made-up engines."""

import asyncio
import math
import threading

import pytest

from judge.likelihood import LikelihoodJudge
from judge.messages import Message
from judge.pairwise import PairwiseJudge
from judge.principles import DEFAULT, Principle
from judge.prompts import Question
from judge.protocol import Judge
from judge.verdict import Verdict

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
        logprobs = []
        for text in texts:
            a, b = text.split("[Response A]\n")[1].split("<|end|>")[0].split("\n[Response B]\n")
            p = self.probability_of_a(a, b)
            logprobs.append((math.log(p), math.log(1 - p)))
        return logprobs

    async def write(self, prompt, max_tokens):
        """Three pieces, of a token each; the first ends the label's sentence."""
        self.batches.append([self.tokenizer.decode(prompt)])
        for piece in (".", "\nA: so", " it is.")[:max_tokens]:
            yield piece, 1


def compare(tokenizer, probability_of_a, pairs, principles=DEFAULT, **options):
    engine = Engine(tokenizer, probability_of_a)
    judge = PairwiseJudge(
        tokenizer, principles, engine, engine.write, **{"max_tokens": 1000} | options
    )
    questions = [Question(PROMPT, *pair) for pair in pairs]
    return asyncio.run(judge.compare(questions)), judge, engine


def test_prefers_the_longer_whatever_the_order(tokenizer):
    results, _, _ = compare(
        tokenizer,
        lambda a, b: 0.9 if len(a) > len(b) else 0.2,
        [("You look well.", "Hm."), ("Hm.", "You look well.")],
    )
    assert [result.winner for result in results] == ["a", "b"]
    # Longer first: p(A) = 0.9; longer second: p(B) = 1 - 0.2.
    assert results[0].by_principle["overall"].orders == pytest.approx((0.9, 0.8))
    assert results[1].by_principle["overall"].orders == pytest.approx((0.2, 0.1))


def test_position_bias_is_a_tie(tokenizer):
    (result,), _, _ = compare(tokenizer, lambda a, b: 0.99, [("x", "y")])
    assert result.winner == "tie"
    assert result.probability == pytest.approx(0.5)


def test_both_orders_of_all_pairs_go_in_one_batch(tokenizer):
    _, judge, engine = compare(tokenizer, lambda a, b: 0.6, [("x", "y"), ("u", "v")])
    (batch,) = engine.batches
    responses = [text.split("[Response A]\n")[1].split("<|end|>")[0] for text in batch]
    assert responses == [f"{a}\n[Response B]\n{b}" for a, b in ("xy", "yx", "uv", "vu")]
    assert judge.usage.prompt_tokens == sum(
        len(tokenizer.encode(text, add_special_tokens=False)) for text in batch
    )
    assert judge.usage.completion_tokens == 4


def test_the_engine_is_asked_for_the_labels_of_this_tokenizer(tokenizer):
    _, _, engine = compare(tokenizer, lambda a, b: 0.6, [("x", "y")])
    (labels,) = engine.labels
    assert len(set(labels)) == 1 and len(labels) == 2
    a, b = labels[0]
    assert (tokenizer.decode([a]), tokenizer.decode([b])) == (" A", " B")


def test_identical_responses_are_a_tie_without_a_call(tokenizer):
    results, judge, engine = compare(tokenizer, lambda a, b: 0.9, [("x", "x"), ("y", "y")])
    assert [result.winner for result in results] == ["tie", "tie"]
    assert engine.batches == []  # the engine was not called
    assert judge.usage.as_json() == {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
    }


def test_identical_pairs_keep_their_places(tokenizer):
    results, _, engine = compare(
        tokenizer,
        lambda a, b: 0.9 if a < b else 0.1,
        [("x", "x"), ("a", "b"), ("y", "y"), ("d", "c")],
    )
    assert [result.winner for result in results] == ["tie", "a", "tie", "b"]
    assert len(engine.batches[0]) == 4


def test_usage_adds_up_over_calls(tokenizer):
    engine = Engine(tokenizer, lambda a, b: 0.6)
    judge = PairwiseJudge(tokenizer, DEFAULT, engine, engine.write, max_tokens=1000)
    for _ in range(3):
        asyncio.run(judge.compare([Question(PROMPT, "x", "y")]))
    assert judge.usage.completion_tokens == 6


def test_all_principles_in_one_batch_with_labels_of_their_own(tokenizer):
    principles = {
        "short": Principle(system="Choose the shorter."),
        "loud": Principle(system="Choose the louder.", answer="The better response is"),
    }

    engine = Engine(tokenizer, lambda a, b: 0.9)
    judge = PairwiseJudge(
        tokenizer, principles, engine, engine.write, max_tokens=1000, tie_band=0.125
    )
    questions = [Question(PROMPT, "x", "y"), Question(PROMPT, "z", "z"), Question(PROMPT, "u", "v")]
    results = asyncio.run(judge.compare(questions))
    (batch,) = engine.batches
    system_prompts = [text.split("<|end|>")[0].removeprefix("<|system|>") for text in batch]
    assert (
        system_prompts
        == ["Choose the shorter."] * 2 + ["Choose the louder."] * 2 + system_prompts[:4]
    )
    assert [list(result.by_principle) for result in results] == [["short", "loud"]] * 3
    assert results[0].by_principle["loud"].tie_band == 0.125


def test_what_is_too_long_is_shortened_and_flagged(tokenizer):
    lengths = []

    def probability_of_a(a, b):
        lengths.append((len(a), len(b)))
        return 0.6

    results, judge, engine = compare(
        tokenizer, probability_of_a, [("x" * 500, "y"), ("x", "y")], max_tokens=200
    )
    assert [result.truncated for result in results] == [True, False]
    (batch,) = engine.batches
    prompt_lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in batch]
    assert max(prompt_lengths[:2]) == 200  # the limit
    assert judge.usage.prompt_tokens == sum(prompt_lengths)
    # Both orders show the same.
    assert lengths[0] == lengths[1][::-1]


def explain(tokenizer, question, orders, max_tokens=9):
    engine = Engine(tokenizer, lambda a, b: 0.6)
    judge = PairwiseJudge(tokenizer, DEFAULT, engine, engine.write, max_tokens=1000)

    async def pieces():
        stream = judge.rationale(question, "overall", Verdict(orders), max_tokens)
        return [piece async for piece in stream]

    return asyncio.run(pieces()), judge, engine


@pytest.mark.parametrize(("orders", "label"), [((0.9, 0.6), " A"), ((0.4, 0.3), " B")])
def test_a_rationale_goes_on_after_the_verdicts_label(tokenizer, orders, label):
    pieces, judge, engine = explain(tokenizer, Question(PROMPT, "x", "y"), orders)
    assert pieces == ["A: so", " it is."]
    ((prompt,),) = engine.batches
    assert prompt.endswith(
        f"[Response A]\nx\n[Response B]\ny<|end|><|assistant|>The better response is{label}"
    )
    assert judge.usage.as_json() == {
        "prompt_tokens": len(tokenizer.encode(prompt, add_special_tokens=False)),
        "completion_tokens": 3,
        "total_tokens": judge.usage.prompt_tokens + 3,
    }


def test_a_rationale_of_identical_responses(tokenizer):
    pieces, judge, engine = explain(tokenizer, Question(PROMPT, "x", "x"), (0.5, 0.5))
    assert pieces == [] and engine.batches == [] and judge.usage.completion_tokens == 0


class BlockingTokenizer:
    """Encodes only when the event loop has gone on meanwhile."""

    def __init__(self, tokenizer):
        self.tokenizer, self.loop_went_on = tokenizer, threading.Event()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, **options):
        assert self.loop_went_on.wait(10), "the event loop waited for the tokenizer"
        return self.tokenizer.encode(text, **options)


@pytest.mark.parametrize("kind", ["pairwise", "likelihood"])
def test_the_tokenizer_does_not_hold_up_the_event_loop(tokenizer, kind):
    blocking = BlockingTokenizer(tokenizer)

    async def scores(readings):
        return [0.0] * len(readings)

    async def run():
        judge: Judge
        if kind == "pairwise":
            engine = Engine(tokenizer, lambda a, b: 0.6)
            judge = PairwiseJudge(blocking, DEFAULT, engine, engine.write, max_tokens=1000)
        else:
            judge = LikelihoodJudge(blocking, scores, beta=1.0, max_tokens=1000)
        task = asyncio.create_task(judge.compare([Question(PROMPT, "Yes.", "No.")]))
        await asyncio.sleep(0.1)
        blocking.loop_went_on.set()
        return await task

    assert len(asyncio.run(run())) == 1
