"""The trace: the proxy's decisions about every token, whole and streamed."""

import asyncio
import math
from types import SimpleNamespace

import pytest

from tests.server.conftest import DEMO
from tests.server.test_chat import chat, tokens

TRACED = {"alignment": {"trace": True}}
ALIGNED = "assent-demo:aligned"


def num_rejected(trace):
    return sum(len(entry["rejected"]) for choice in trace for entry in choice)


def collect_trace(chunks, num_choices=1):
    """The trace put together from the chunks of a stream."""
    trace = [[] for _ in range(num_choices)]
    for chunk in chunks:
        for part in chunk.model_extra.get("alignment", {}).get("trace", ()):
            assert set(part) == {"index", "entries"}
            trace[part["index"]] += part["entries"]
    return trace


def test_every_token_has_its_entry(client):
    answer = chat(client, ALIGNED, seed=1, n=3, extra=TRACED)
    alignment = answer.alignment
    trace = alignment["trace"]
    assert [[entry["token_id"] for entry in choice] for choice in trace] == tokens(answer)
    assert alignment["trace_truncated"] is False
    assert num_rejected(trace) == alignment["rejected"] > 0
    entries = [entry for choice in trace for entry in choice]
    assert sum(entry["forced"] for entry in entries) == alignment["forced"]
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
    for choice, answer_choice in zip(trace, answer.choices, strict=True):
        if (
            answer_choice.finish_reason == "stop"
        ):  # the last one is the end of the turn, which has no text
            choice = choice[:-1]
        assert "".join(entry["token"] for entry in choice) == answer_choice.message.content


def test_only_those_who_ask_get_one(client):
    answer = chat(client, ALIGNED, seed=1)
    traced = chat(client, ALIGNED, seed=1, extra=TRACED)
    assert tokens(answer) == tokens(traced)
    assert answer.alignment == {
        key: value for key, value in traced.alignment.items() if not key.startswith("trace")
    }


def test_the_same_whole_and_streamed(client):
    alignment = chat(client, ALIGNED, seed=4, extra=TRACED).alignment
    chunks = list(chat(client, ALIGNED, seed=4, extra=TRACED, stream=True))
    assert collect_trace(chunks) == alignment["trace"]
    assert chunks[-1].alignment | {"trace": alignment["trace"]} == alignment


def test_choices_streamed_side_by_side(client):
    chunks = list(chat(client, ALIGNED, seed=4, n=3, extra=TRACED, stream=True))
    token_ids = [[], [], []]
    for chunk in chunks:
        for choice in chunk.choices:
            token_ids[choice.index] += choice.model_extra.get("token_ids") or []
    trace = collect_trace(chunks, 3)
    assert [[entry["token_id"] for entry in choice] for choice in trace] == token_ids
    assert num_rejected(trace) == chunks[-1].alignment["rejected"]


@pytest.mark.parametrize("usage", [False, True])
def test_entries_come_with_their_tokens(client, usage):
    """With every chunk as many entries as tokens; the role's chunk may have the first one early."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(chat(client, ALIGNED, seed=1, stream=True, extra=TRACED, **options))
    received_ids, traced_ids = [], []
    for chunk in chunks:
        for choice in chunk.choices:
            received_ids += choice.model_extra.get("token_ids") or []
        traced_ids += [entry["token_id"] for entry in collect_trace([chunk])[0]]
        assert traced_ids == received_ids or chunk is chunks[0]
    assert sum(bool(collect_trace([chunk])[0]) for chunk in chunks) > 5
    assert "proposed" in chunks[-1].alignment
    assert not any("proposed" in chunk.model_extra.get("alignment", {}) for chunk in chunks[:-1])


def test_strength_is_in_the_accept_probability(client):
    """Greedy, so that both score the same first candidate: a^2 is the square of a."""

    def first_entry(strength):
        extra = {"alignment": {"trace": True, "strength": strength, "max_rejections": 1}}
        answer = chat(client, ALIGNED, temperature=0, max_tokens=1, extra=extra)
        return answer.alignment["trace"][0][0]

    at_strength_1, at_strength_2 = first_entry(1.0), first_entry(2.0)
    assert at_strength_1["token_id"] == at_strength_2["token_id"]
    assert at_strength_2["accept_probability"] == pytest.approx(
        at_strength_1["accept_probability"] ** 2, rel=1e-3
    )


def test_who_was_not_asked_says_so(client):
    """Without rejections nothing is scored: every token is forced."""
    extra = {"alignment": {"trace": True, "max_rejections": 0}}
    answer = chat(client, ALIGNED, seed=1, max_tokens=8, extra=extra)
    (trace,) = answer.alignment["trace"]
    assert [entry["forced"] for entry in trace] == [True] * answer.usage.completion_tokens
    assert {entry["accept_probability"] for entry in trace} == {None}
    assert num_rejected([trace]) == 0


def test_strength_0_has_nothing_to_show(client):
    extra = {"alignment": {"trace": True, "strength": 0}}
    alignment = chat(client, ALIGNED, seed=1, n=2, extra=extra).alignment
    assert alignment["trace"] == [[], []]
    assert alignment["trace_truncated"] is False


def test_nothing_after_a_stop_string(client):
    """The worker may be beyond it already; the answer and its trace are not."""
    answer = chat(client, ALIGNED, seed=2)
    words = answer.choices[0].message.content.split()
    stopped = chat(client, ALIGNED, seed=2, stop=[words[len(words) // 2]], extra=TRACED)
    assert [
        [entry["token_id"] for entry in choice] for choice in stopped.alignment["trace"]
    ] == tokens(stopped)
    chunks = list(
        chat(client, ALIGNED, seed=2, stop=[words[len(words) // 2]], extra=TRACED, stream=True)
    )
    assert collect_trace(chunks) == stopped.alignment["trace"]


def test_probabilities_are_the_nucleus_own(client):
    """Top-k 1 leaves one candidate, whose probability is 1; the nucleus is that of the training's temperature."""
    single_candidate = chat(client, ALIGNED, max_tokens=4, extra=TRACED | {"top_k": 1}).alignment[
        "trace"
    ][0]
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
    assert any(math.isclose(entry["probability"], 1, abs_tol=1e-5) for entry in single_candidate)
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
    assert num_rejected(trace) == answer["alignment"]["rejected"]


@pytest.mark.parametrize(("num_kept", "truncated"), [(3, False), (2, True)])
def test_entries_that_the_worker_dropped_are_missed(num_kept, truncated):
    """They are dropped after 4096 tokens, which no answer of the demo's LLM can have."""
    from transformers import AutoTokenizer

    from server.access import Limits
    from server.admission import Admission
    from server.alignment_stats import AlignmentCounts
    from server.proxies import ServedVersion
    from server.schemas.alignment import AlignmentOptions, JudgeOptions
    from server.traces import Trace

    class Worker:
        async def take(self, request_ids):
            entry = {"token_id": 5, "rejected": []}
            return {(request_ids[0], 0): [entry] * num_kept}

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    state = SimpleNamespace(engine=SimpleNamespace(renderer=renderer), traces=Worker())
    proxy = ServedVersion("a", "v1", {}, "serving")
    alignment = AlignmentOptions(trace=True).for_worker({proxy: 1.0})
    admission = Admission("llm:a", alignment, (proxy,), Limits(), True, 1, JudgeOptions(), None)
    counts = AlignmentCounts(None, in_response=True, engine_ids=["x"])
    counts.delivered["x", 0] = 3
    trace = Trace(admission, counts, state)
    (part,) = asyncio.run(trace.advance())
    assert len(part["entries"]) == num_kept
    assert trace.is_truncated() is truncated
