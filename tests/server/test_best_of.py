"""Best of N: the winner, the record of its tournament, and the usage."""

import json

import openai
import pytest

from judge.tournament import replay
from tests.server.conftest import ROUNDING

QUESTION = [{"role": "user", "content": "How do I look after my puzzle?"}]


def best_of(client, num, model="assent-demo:aligned", judge=None, alignment=None, **options):
    alignment = {"best_of": num} | ({"judge": judge} if judge else {}) | (alignment or {})
    return client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=32,
        extra_body={"alignment": alignment},
        **options,
    )


def test_the_receipt_replays_to_the_returned_sample(client):
    answer = best_of(client, 5, seed=11, judge={"seed": 3})
    record = answer.alignment["judge"]
    assert (record["seed"], record["num"]) == (3, 5)
    assert record["principles"] == ["overall"]
    assert replay(record) == record["ranking"]
    assert record["winner"] == record["ranking"][0]
    (choice,) = answer.choices
    assert choice.index == 0

    samples = client.chat.completions.create(
        model="assent-demo:aligned",
        messages=QUESTION,
        max_tokens=32,
        seed=11,
        n=5,
        extra_body={"alignment": {}},
    )
    assert choice.message.content == samples.choices[record["winner"]].message.content
    for key in ("proxy", "version", "proposed", "accepted", "rejected", "forced"):
        assert answer.alignment[key] == samples.alignment[key]

    # The usage counts every token: of all samples, and of the judge.
    judge_usage = record["usage"]
    assert judge_usage["prompt_tokens"] > 0
    assert answer.usage.prompt_tokens == samples.usage.prompt_tokens + judge_usage["prompt_tokens"]
    assert answer.usage.completion_tokens == (
        samples.usage.completion_tokens + judge_usage["completion_tokens"]
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_both_orders_of_each_pair_are_read(client):
    record = best_of(client, 4, seed=1).alignment["judge"]
    comparisons = [comparison for games in record["rounds"] for comparison in games]
    assert [len(games) for games in record["rounds"]] == [2, 1]
    for comparison in comparisons:
        ((first, second),) = comparison["orders"].values()
        assert 0 <= first <= 1
        assert 0 <= second <= 1
        assert comparison["probability"] == pytest.approx((first + second) / 2)
    # 2 a pair; identical ones are free.
    assert record["usage"]["completion_tokens"] in (0, 2, 4, 6)


def test_the_same_seeds_give_the_same_answer(client):
    first, second = (best_of(client, 3, seed=2) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.alignment["judge"]["rounds"] == second.alignment["judge"]["rounds"]
    assert first.alignment["judge"]["seed"] == 2  # the request's own


def test_judging_does_not_pass_through_the_proxy(client, http):
    """The judge's verdict on the pair is that of /judge."""
    answer = best_of(client, 2, seed=5)
    samples = client.chat.completions.create(
        model="assent-demo:aligned", messages=QUESTION, max_tokens=32, seed=5, n=2
    )
    texts = [choice.message.content for choice in samples.choices]
    ((comparison,),) = answer.alignment["judge"]["rounds"]
    first, second = comparison["pair"]
    verdict = http.post(
        "/judge",
        json={"messages": QUESTION, "response_a": texts[first], "response_b": texts[second]},
    ).json()
    assert comparison["orders"]["overall"] == pytest.approx(verdict["orders"], abs=ROUNDING)


def test_without_a_proxy(client):
    answer = best_of(client, 3, model="assent-demo")
    assert answer.alignment["proxy"] is None
    assert replay(answer.alignment["judge"]) == answer.alignment["judge"]["ranking"]


def test_streamed(client):
    answer = best_of(client, 3, seed=8)
    chunks = list(best_of(client, 3, seed=8, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] is not None
    assert chunks[-1].usage == answer.usage
    assert chunks[-1].alignment == answer.alignment
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_tells_of_progress(client):
    chunks = list(best_of(client, 4, seed=1, stream=True))
    opening = {key: chunks[-1].alignment[key] for key in ("proxy", "version", "best_of")}
    assert chunks[0].alignment == opening
    progress = [chunk.alignment["progress"] for chunk in chunks[1:-1]]
    assert [entry["done"] for entry in progress if entry["stage"] == "sampling"] == [1, 2, 3, 4]
    assert [entry["done"] for entry in progress if entry["stage"] == "judging"] == [2, 3]
    comparisons = [entry["comparisons"] for entry in progress if entry["stage"] == "judging"]
    record = chunks[-1].alignment["judge"]
    assert comparisons == record["rounds"]
    texts = {entry["index"]: entry["text"] for entry in progress if entry["stage"] == "sampling"}
    assert sorted(texts) == [0, 1, 2, 3]
    assert texts[record["winner"]] == chunks[-1].choices[0].delta.content
    assert all(not chunk.choices[0].delta.content for chunk in chunks[:-1])


@pytest.mark.parametrize("n", [1, 2])
def test_openais_stream_helper_has_the_same_message_and_all_of_alignment(client, n):
    answer = best_of(client, 3, seed=8, n=n)
    with client.chat.completions.stream(
        model="assent-demo:aligned",
        messages=QUESTION,
        max_tokens=32,
        seed=8,
        n=n,
        extra_body={"alignment": {"best_of": 3}},
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.alignment == answer.alignment
    assert final.alignment["proxy"] == "aligned" and "progress" not in final.alignment
    for choice, expected in zip(final.choices, answer.choices, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == expected.message.content
        assert choice.finish_reason == expected.finish_reason


def test_streamed_without_usage(client):
    chunks = list(best_of(client, 2, stream=True, logprobs=True))
    assert chunks[-1].choices[0].finish_reason is not None
    assert chunks[-1].alignment["judge"]["num"] == 2
    assert chunks[-1].choices[0].logprobs.content
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_the_best_n_in_order(client, stream):
    samples = client.chat.completions.create(
        model="assent-demo:aligned", messages=QUESTION, max_tokens=32, seed=4, n=5
    )
    answer = best_of(client, 5, seed=4, n=3, judge={"strategy": "round-robin"}, stream=stream)
    if stream:
        *_, first, second, third = answer
        record = third.alignment["judge"]
        choices = [chunk.choices[0] for chunk in (first, second, third)]
        texts = [choice.delta.content for choice in choices]
    else:
        record, choices = answer.alignment["judge"], answer.choices
        texts = [choice.message.content for choice in choices]
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert texts == [samples.choices[i].message.content for i in record["ranking"][:3]]
    assert len(record["rounds"][0]) == 10
    assert replay(record) == record["ranking"]


def test_several_principles_would_be_asked_each(client):
    with pytest.raises(openai.BadRequestError, match="unknown principle 'loudness'; known are"):
        best_of(client, 2, judge={"principles": ["overall", "loudness"]})


def test_a_sample_that_takes_too_long_drops_out(client):
    """None is done within a microsecond: that is an error, and no sample is left running."""
    with pytest.raises(
        openai.InternalServerError, match="sample 2 was not finished after 1e-06"
    ) as raised:
        best_of(client, 3, alignment={"sample_timeout": 1e-6})
    assert raised.value.status_code == 504
    answer = best_of(client, 3, alignment={"sample_timeout": 60})
    assert answer.alignment["dropped"] == []


def test_adaptive_draws_what_it_compares(client):
    samples = client.chat.completions.create(
        model="assent-demo:aligned", messages=QUESTION, max_tokens=32, seed=11, n=8
    )
    answer = best_of(client, 8, seed=11, judge={"strategy": "adaptive"})
    alignment, record = answer.alignment, answer.alignment["judge"]
    assert alignment["drawn"] in (4, 8)
    assert (alignment["best_of"], alignment["stopped"], alignment["dropped"]) == (8, [], [])
    assert sorted(record["ranking"]) == list(range(alignment["drawn"]))
    assert sum(map(len, record["rounds"])) == alignment["drawn"] - 1
    assert replay(record) == record["ranking"]
    assert answer.choices[0].message.content == samples.choices[record["winner"]].message.content
    chunks = list(best_of(client, 8, seed=11, judge={"strategy": "adaptive"}, stream=True))
    assert chunks[-1].alignment["judge"]["ranking"] == record["ranking"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        answer.choices[0].message.content
    )


@pytest.mark.parametrize("strategy", ["knock-out", "adaptive"])
def test_samples_that_lose_while_they_grow_are_stopped(client, strategy):
    """All would have 400 tokens; the winner gets them, and who lost long before does not."""
    alignment = {"best_of": 4, "judge": {"strategy": strategy, "prefix_tokens": 8}}

    def ask(alignment, seed=5, **options):
        return client.chat.completions.create(
            model="assent-demo",
            messages=QUESTION,
            max_tokens=400,
            seed=seed,
            extra_body={"ignore_eos": True, "alignment": alignment},
            **options,
        )

    answer = ask(alignment)
    record, stopped = answer.alignment["judge"], answer.alignment["stopped"]
    assert [[game["tokens"] for game in games] for games in record["rounds"]] == [[8, 8], [16]]
    assert replay(record) == record["ranking"]
    losers = {
        index: number
        for number, games in enumerate(record["rounds"], start=1)
        for game in games
        for index in game["pair"]
        if index != game["winner"]
    }
    assert stopped and {s["index"]: s["round"] for s in stopped}.items() <= losers.items()
    assert all(8 <= sample["tokens"] < 400 for sample in stopped)
    # All tokens are counted, and the winner is whole.
    tokens = 400 * (4 - len(stopped)) + sum(sample["tokens"] for sample in stopped)
    assert answer.usage.completion_tokens == tokens + record["usage"]["completion_tokens"]
    winner = ask({}, seed=5 + record["winner"]).choices[0].message.content
    assert answer.choices[0].message.content == winner
    # The judge has read the first tokens, not what had come meanwhile.
    *chunks, last = ask(alignment, stream=True)
    for games, others in zip(last.alignment["judge"]["rounds"], record["rounds"], strict=True):
        for game, other in zip(games, others, strict=True):
            assert game["orders"]["overall"] == pytest.approx(
                other["orders"]["overall"], abs=ROUNDING
            )
    stages = [chunk.alignment["progress"]["stage"] for chunk in chunks[1:]]
    assert stages.count("judging") == 2
    assert stages.count("stopped") == len(last.alignment["stopped"])


def test_a_sample_that_drops_out_forfeits(client):
    with pytest.raises(openai.InternalServerError, match="was not finished after 1e-06") as raised:
        best_of(client, 4, alignment={"sample_timeout": 1e-6}, judge={"strategy": "adaptive"})
    assert raised.value.status_code == 504


@pytest.mark.parametrize(("rotations", "readings"), [(None, 4), (1, 1)])
def test_a_choice_among_all_in_one_call(client, rotations, readings):
    judge = {"strategy": "one-call"} | ({"rotations": rotations} if rotations else {})
    answer = best_of(client, 4, seed=1, judge=judge)
    record = answer.alignment["judge"]
    assert record["rounds"] == [] and len(record["readings"]) == readings
    for reading in record["readings"]:
        assert sum(reading["probabilities"]["overall"]) == pytest.approx(1)
    assert replay(record) == record["ranking"]
    assert record["usage"]["completion_tokens"] == readings


@pytest.mark.parametrize(
    ("num", "judge", "options", "reason"),
    [
        (4, {"strategy": "adaptive"}, {"n": 2}, "n must be 1 with strategy adaptive"),
        (4, {"prefix_tokens": 8, "strategy": "round-robin"}, {}, "use knock-out or adaptive"),
        (4, {"rotations": 2}, {}, "only with the strategy one-call"),
        (16, {"strategy": "one-call"}, {}, "choice among 16 needs as many letters"),
        (
            4,
            {"strategy": "one-call", "kind": "proxy", "proxy": "aligned"},
            {},
            "read each response once",
        ),
    ],
)
def test_what_does_not_go_together(client, num, judge, options, reason):
    with pytest.raises(openai.BadRequestError, match=reason):
        best_of(client, num, judge=judge, **options)


def test_structured_outputs(client):
    answer = client.chat.completions.create(
        model="assent-demo:aligned",
        messages=QUESTION,
        max_tokens=32,
        extra_body={
            "alignment": {"best_of": 3},
            "structured_outputs": {"regex": r'\{"object": "(puzzle|rose)"\}'},
        },
    )
    assert json.loads(answer.choices[0].message.content)["object"] in ("puzzle", "rose")
    assert answer.alignment["proxy"] == "aligned"


def test_a_call_of_a_tool(client):
    """The judge reads the calls, which the request forces."""
    schema = {"type": "object", "properties": {"object": {"enum": ["puzzle", "rose"]}}}
    function = {"name": "note", "parameters": schema | {"required": ["object"]}}
    answer = client.chat.completions.create(
        model="assent-demo:aligned",
        messages=QUESTION,
        max_tokens=64,
        seed=1,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        extra_body={"alignment": {"best_of": 4}},
    )
    (tool_call,) = answer.choices[0].message.tool_calls
    assert json.loads(tool_call.function.arguments)["object"] in ("puzzle", "rose")
    # Some of the four differ, so there was something to read.
    assert answer.alignment["judge"]["usage"]["prompt_tokens"] > 0


def test_samples_too_long_to_be_judged_are_cut(client):
    answer = client.chat.completions.create(
        model="assent-demo",
        messages=[{"role": "user", "content": "a " * 600}],
        max_tokens=250,
        extra_body={"ignore_eos": True, "alignment": {"best_of": 2}},
    )
    ((comparison,),) = answer.alignment["judge"]["rounds"]
    assert comparison["truncated"]
    assert answer.usage.completion_tokens == 2 * 250 + 2
