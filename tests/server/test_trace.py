"""The trace: what the proxy was asked for every token, whole and streamed."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from tests.server.conftest import DEMO
from tests.server.test_chat import chat, tokens

TRACED = {"alignment": {"trace": True}}
ALIGNED = "assent-demo:aligned"


def rejected(trace):
    return sum(len(entry["rejected"]) for choice in trace for entry in choice)


def streamed(chunks, num_choices=1):
    """The trace put together from the chunks of a stream."""
    trace = [[] for _ in range(num_choices)]
    for chunk in chunks:
        for part in chunk.model_extra.get("alignment", {}).get("trace", ()):
            assert set(part) == {"index", "entries"}
            trace[part["index"]] += part["entries"]
    return trace


def test_every_token_has_its_entry(client):
    answer = chat(client, ALIGNED, seed=1, n=3, extra=TRACED)
    receipt = answer.alignment
    trace = receipt["trace"]
    assert [[entry["token_id"] for entry in choice] for choice in trace] == tokens(answer)
    assert receipt["trace_truncated"] is False
    assert rejected(trace) == receipt["rejected"] > 0
    entries = [entry for choice in trace for entry in choice]
    assert sum(entry["forced"] for entry in entries) == receipt["forced"]
    for entry in entries:
        assert set(entry) == {
            "token", "token_id", "probability", "accept_probability", "forced", "rejected",
        }  # fmt: skip
        for candidate in [entry, *entry["rejected"]]:
            assert 0 < candidate["probability"] <= 1 + 1e-5
            if candidate["accept_probability"] is None:  # there was no other
                assert candidate["probability"] == 1 and not entry["rejected"]
            else:
                assert 0 <= candidate["accept_probability"] <= 1
        ids = [candidate["token_id"] for candidate in [entry, *entry["rejected"]]]
        assert len(set(ids)) == len(ids) or entry["forced"]
    for choice, said in zip(trace, answer.choices, strict=True):
        if said.finish_reason == "stop":  # the last one is the end of the turn, which has no text
            choice = choice[:-1]
        assert "".join(entry["token"] for entry in choice) == said.message.content


def test_only_those_who_ask_get_one(client):
    answer = chat(client, ALIGNED, seed=1)
    traced = chat(client, ALIGNED, seed=1, extra=TRACED)
    assert tokens(answer) == tokens(traced)
    assert answer.alignment == {
        key: value for key, value in traced.alignment.items() if not key.startswith("trace")
    }


def test_the_same_whole_and_streamed(client):
    whole = chat(client, ALIGNED, seed=4, extra=TRACED).alignment
    chunks = list(chat(client, ALIGNED, seed=4, extra=TRACED, stream=True))
    assert streamed(chunks) == whole["trace"]
    assert chunks[-1].alignment | {"trace": whole["trace"]} == whole


def test_choices_streamed_side_by_side(client):
    chunks = list(chat(client, ALIGNED, seed=4, n=3, extra=TRACED, stream=True))
    said = [[], [], []]
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.model_extra.get("token_ids") or []
    trace = streamed(chunks, 3)
    assert [[entry["token_id"] for entry in choice] for choice in trace] == said
    assert rejected(trace) == chunks[-1].alignment["rejected"]


@pytest.mark.parametrize("usage", [False, True])
def test_entries_come_with_their_tokens(client, usage):
    """At every chunk as many as tokens have been brought; the role's chunk announces the first."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(chat(client, ALIGNED, seed=1, stream=True, extra=TRACED, **options))
    brought, traced = [], []
    for chunk in chunks:
        for choice in chunk.choices:
            brought += choice.model_extra.get("token_ids") or []
        traced += [entry["token_id"] for entry in streamed([chunk])[0]]
        assert traced == brought or chunk is chunks[0]
    assert sum(bool(streamed([chunk])[0]) for chunk in chunks) > 5
    assert "proposed" in chunks[-1].alignment
    assert not any("proposed" in c.model_extra.get("alignment", {}) for c in chunks[:-1])


def test_strength_is_in_the_accept_probability(client):
    """Greedy, so that both ask the same first question: a^2 is the square of a."""

    def first(strength):
        extra = {"alignment": {"trace": True, "strength": strength, "max_rejections": 1}}
        answer = chat(client, ALIGNED, temperature=0, max_tokens=1, extra=extra)
        return answer.alignment["trace"][0][0]

    once, twice = first(1.0), first(2.0)
    assert once["token_id"] == twice["token_id"]
    assert twice["accept_probability"] == pytest.approx(once["accept_probability"] ** 2, rel=1e-3)


def test_who_was_not_asked_says_so(client):
    """Without rejections nothing is asked: every token is forced."""
    extra = {"alignment": {"trace": True, "max_rejections": 0}}
    answer = chat(client, ALIGNED, seed=1, max_tokens=8, extra=extra)
    (trace,) = answer.alignment["trace"]
    assert [entry["forced"] for entry in trace] == [True] * answer.usage.completion_tokens
    assert {entry["accept_probability"] for entry in trace} == {None}
    assert rejected([trace]) == 0


def test_strength_0_has_nothing_to_show(client):
    extra = {"alignment": {"trace": True, "strength": 0}}
    receipt = chat(client, ALIGNED, seed=1, n=2, extra=extra).alignment
    assert receipt["trace"] == [[], []]
    assert receipt["trace_truncated"] is False


def test_nothing_after_a_stop_string(client):
    """The worker may be past it already; the answer is not, and neither is its trace."""
    whole = chat(client, ALIGNED, seed=2)
    words = whole.choices[0].message.content.split()
    cut = chat(client, ALIGNED, seed=2, stop=[words[len(words) // 2]], extra=TRACED)
    assert [[entry["token_id"] for entry in choice] for choice in cut.alignment["trace"]] == tokens(
        cut
    )
    chunks = list(
        chat(client, ALIGNED, seed=2, stop=[words[len(words) // 2]], extra=TRACED, stream=True)
    )
    assert streamed(chunks) == cut.alignment["trace"]


def test_probabilities_are_the_nucleus_own(client):
    """Top-k 1 leaves one candidate, whose probability is 1; the nucleus is that of the training's temperature."""
    only = chat(client, ALIGNED, max_tokens=4, extra=TRACED | {"top_k": 1}).alignment["trace"][0]
    greedy, sharp, flat = (
        chat(
            client,
            ALIGNED,
            max_tokens=1,
            temperature=temperature,
            extra={"alignment": {"trace": True, "max_rejections": 0}},
        ).alignment["trace"][0][0]
        for temperature in (0.0, 0.5, 2.0)
    )
    assert any(math.isclose(entry["probability"], 1, abs_tol=1e-5) for entry in only)
    assert greedy["token_id"] == sharp["token_id"] == flat["token_id"]
    assert greedy["probability"] == pytest.approx(flat["probability"], rel=1e-4)
    assert sharp["probability"] == pytest.approx(flat["probability"], rel=1e-4)


def test_completions_have_traces_by_prompt_and_sample(http):
    body = {
        "model": ALIGNED,
        "prompt": ["Hello", "How do I"],
        "n": 2,
        "seed": 1,
        "max_tokens": 6,
        "return_token_ids": True,
        "alignment": {"trace": True},
    }
    answer = http.post("/v1/completions", json=body).json()
    trace = answer["alignment"]["trace"]
    assert [[entry["token_id"] for entry in choice] for choice in trace] == [
        choice["token_ids"] for choice in answer["choices"]
    ]
    assert rejected(trace) == answer["alignment"]["rejected"]


@pytest.mark.parametrize(("kept", "truncated"), [(3, False), (2, True)])
def test_entries_that_the_worker_dropped_are_missed(kept, truncated):
    """Of 4096 tokens and more, which no answer of the demo's LLM can have."""
    from transformers import AutoTokenizer

    from server.access import Limits
    from server.admission import Admission
    from server.alignment_stats import AlignmentCounts
    from server.schemas import AlignmentOptions, JudgeOptions
    from server.traces import Trace

    class Worker:
        async def take(self, request_ids):
            entry = {"token_id": 5, "rejected": []}
            return {(request_ids[0], 0): [entry] * kept}

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    state = SimpleNamespace(engine=SimpleNamespace(renderer=renderer), traces=Worker())
    alignment = AlignmentOptions(trace=True).for_worker("a", "v1")
    admission = Admission("llm:a", alignment, None, Limits(), True, 1, JudgeOptions(), None)
    counts = AlignmentCounts(None, in_response=True, engine_ids=["x"])
    counts.delivered["x", 0] = 3
    trace = Trace(admission, counts, state)
    (shown,) = asyncio.run(trace.advance())
    assert len(shown["entries"]) == kept
    assert trace.is_truncated() is truncated
