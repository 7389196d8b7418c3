"""The likelihood-ratio judge with a made-up engine."""

import asyncio
import math

import pytest

from judge.likelihood import LikelihoodJudge
from judge.messages import Message
from judge.prompts import JudgePromptError, Question, response_ids
from tests.judge.conftest import make_tokenizer

PROMPT: list[Message] = [{"role": "user", "content": "Say something nice."}]
SCORES = {"good": 3.0, "fair": 1.0, "bad": -40.0}


class Engine:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.batches = []

    async def __call__(self, readings):
        texts = [self.tokenizer.decode(reading.response) for reading in readings]
        self.batches.append(texts)
        return [SCORES.get(text.removesuffix("<|end|>"), 0.0) for text in texts]


@pytest.fixture
def engine(tokenizer):
    return Engine(tokenizer)


def compare(engine, pairs, judge=None, **options):
    judge = judge or LikelihoodJudge(
        engine.tokenizer, engine, **{"beta": 0.5, "max_tokens": 1000} | options
    )
    questions = [Question(PROMPT, *pair) for pair in pairs]
    return asyncio.run(judge.compare(questions)), judge


def test_the_probability_is_bradley_terrys_and_knows_no_order(engine):
    results, _ = compare(engine, [("good", "fair"), ("fair", "good"), ("bad", "good")])
    for result, expected in zip(results, (1 / (1 + math.exp(-1)), 1 / (1 + math.e)), strict=False):
        assert result.by_principle["likelihood"].orders == pytest.approx((expected, expected))
    assert [result.winner for result in results] == ["a", "b", "b"]
    assert results[2].probability == pytest.approx(math.exp(-21.5), rel=1e-6)


def test_every_response_is_tokenized_once(engine):
    class CountingTokenizer:
        def __init__(self, tokenizer):
            self.tokenizer, self.texts = tokenizer, []

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def encode(self, text, **options):
            self.texts.append(text)
            return self.tokenizer.encode(text, **options)

    engine.tokenizer = CountingTokenizer(engine.tokenizer)
    compare(engine, [("good", "fair"), ("fair", "bad"), ("bad", "good")])
    # For each response the prompt alone, and the prompt with it.
    assert len(engine.tokenizer.texts) == 2 * 3


def test_every_response_is_read_once(engine):
    _, judge = compare(engine, [("good", "fair"), ("fair", "bad"), ("bad", "bad")])
    assert engine.batches == [["good<|end|>", "fair<|end|>", "bad<|end|>"]]
    usage = judge.usage.as_json()
    compare(engine, [("good", "bad")], judge)
    assert len(engine.batches) == 1 and judge.usage.as_json() == usage
    lengths = [
        sum(map(len, response_ids(engine.tokenizer, PROMPT, text)))
        for text in ("good", "fair", "bad")
    ]
    assert usage["prompt_tokens"] == 2 * sum(lengths)  # by the LoRA and without it
    assert usage["completion_tokens"] == 6


def test_identical_responses_tie_and_cost_nothing(engine):
    (result,), judge = compare(engine, [("good", "good")])
    assert result.winner == "tie" and result.probability == 0.5
    assert engine.batches == [] and judge.usage.prompt_tokens == 0


def test_the_tie_band(engine):
    (result,), _ = compare(engine, [("good", "fair")], tie_band=0.25)
    assert result.winner == "tie"  # 0.231 from the middle


def test_what_is_too_long_is_cut(engine):
    (long_result, short_result), judge = compare(
        engine, [("x" * 500, "y"), ("good", "fair")], max_tokens=60
    )
    assert (long_result.truncated, short_result.truncated) == (True, False)
    assert judge.usage.prompt_tokens <= 2 * 4 * 60
    assert engine.batches[0][0].endswith(" ...<|end|>")


def test_nothing_is_read_after_the_end_of_the_response(engine):
    ends = engine.tokenizer.encode("<|end|>", add_special_tokens=False)
    ends += engine.tokenizer.encode("y", add_special_tokens=False)
    compare(engine, [("stay", "fair")], end_ids=ends, kind="probe", readings=1)
    assert engine.batches == [["stay", "fair<|end|>"]]


def test_a_response_is_what_follows_its_prompt(tokenizer):
    prompt, response = response_ids(tokenizer, PROMPT, "You look well.")
    assert tokenizer.decode(prompt) == "<|user|>Say something nice.<|end|><|assistant|>"
    assert tokenizer.decode(response) == "You look well.<|end|>"


def test_a_response_whose_spaces_join_the_templates_newline():
    tokenizer = make_tokenizer(["\n    return x"] * 5, 400)
    tokenizer.chat_template = tokenizer.chat_template.replace("|>", "|>\n").replace(
        "end|>\n", "end|>"
    )
    text, answer = "<|user|>\nSay something nice.<|end|><|assistant|>\n", "    return x"
    prompt, response = response_ids(tokenizer, PROMPT, answer)
    assert tokenizer.decode(prompt) == text
    assert tokenizer.decode(response) == f"{answer}<|end|>"
    # So the case is the one that is meant: as one text, no token ends at the border.
    whole = tokenizer.encode(text + answer, add_special_tokens=False)
    assert text not in [tokenizer.decode(whole[:end]) for end in range(len(whole))]


def test_a_template_that_writes_an_answered_chat_otherwise(tokenizer):
    class OddTokenizer:
        def apply_chat_template(self, conversation, **options):
            return f"{len(conversation)} turns"

        def encode(self, text, *, add_special_tokens):
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    with pytest.raises(JudgePromptError, match="differently from one that awaits it"):
        response_ids(OddTokenizer(), PROMPT, "x")
