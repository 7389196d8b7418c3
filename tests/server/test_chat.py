"""Chat with and without a proxy, through the real `openai` client."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPTS = [
    "How do I look after my freezer?",
    "Can I lock my pony in a hot car?",
    "I have 55 pounds for my aquarium. Is that enough?",
]


def chat(client, model="assent-demo", prompt=PROMPTS[0], extra=None, **options):
    options.setdefault("max_tokens", 32)
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        # Without the object the answer names the proxy and has no counts.
        extra_body={"return_token_ids": True}
        | ({"alignment": {}} if ":" in model else {})
        | (extra or {}),
        **options,
    )


def tokens(answer):
    return [choice.token_ids for choice in answer.choices]


def assert_counts_add_up(alignment, completion_tokens):
    assert alignment["accepted"] + alignment["forced"] == completion_tokens
    assert alignment["accepted"] + alignment["rejected"] == alignment["proposed"]


def test_without_a_proxy_the_answer_is_vllms(client):
    answer = chat(client)
    assert answer.model == "assent-demo"
    assert "alignment" not in answer.model_extra
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("model", ["assent-demo", "assent-demo:aligned"])
def test_a_seed_makes_it_reproducible(client, model):
    assert tokens(chat(client, model, seed=7)) == tokens(chat(client, model, seed=7))
    answers = {str(tokens(chat(client, model, seed=seed))) for seed in range(6)}
    assert len(answers) > 1


def test_the_proxy_changes_what_is_said(client):
    pairs = [
        (
            chat(client, "assent-demo", prompt, seed=1),
            chat(client, "assent-demo:aligned", prompt, seed=1),
        )
        for prompt in PROMPTS
    ]
    assert any(tokens(base) != tokens(aligned) for base, aligned in pairs)
    for _, aligned in pairs:
        assert aligned.model == "assent-demo:aligned"
        assert aligned.alignment["proxy"] == "aligned"
        assert_counts_add_up(aligned.alignment, aligned.usage.completion_tokens)
    assert sum(aligned.alignment["rejected"] for _, aligned in pairs) > 0


def test_strength_0_is_the_frozen_llm_token_for_token(client):
    for seed in range(8):
        prompt = PROMPTS[seed % len(PROMPTS)]
        answer = chat(
            client,
            "assent-demo:aligned",
            prompt,
            seed=seed,
            extra={"alignment": {"strength": 0}},
        )
        assert tokens(answer) == tokens(chat(client, prompt=prompt, seed=seed))
        assert (answer.alignment["proxy"], answer.alignment["proposed"]) == ("aligned", 0)


def test_greedy_strength_0_is_the_frozen_llm(client):
    answer = chat(
        client, "assent-demo:aligned", temperature=0, extra={"alignment": {"strength": 0}}
    )
    assert tokens(answer) == tokens(chat(client, temperature=0))


def test_the_proxy_can_be_named_in_the_alignment_object(client):
    by_object = chat(client, seed=3, extra={"alignment": {"proxy": "polite"}})
    by_model = chat(client, "assent-demo:polite", seed=3)
    assert tokens(by_object) == tokens(by_model)
    assert by_object.alignment == by_model.alignment
    assert by_object.model == "assent-demo"


def test_no_rejections_allowed_forces_the_most_probable_token(client):
    answer = chat(client, seed=1, extra={"alignment": {"proxy": "aligned", "max_rejections": 0}})
    assert answer.alignment["rejected"] == 0
    assert answer.alignment["forced"] > 0
    assert_counts_add_up(answer.alignment, answer.usage.completion_tokens)
    assert tokens(answer) == tokens(chat(client, temperature=0))


def test_an_empty_alignment_object_has_an_empty_receipt(client):
    answer = chat(client, extra={"alignment": {}})
    assert answer.alignment == {
        "proxy": None,
        "version": None,
        "proposed": 0,
        "accepted": 0,
        "rejected": 0,
        "forced": 0,
    }


def test_n_choices_differ_and_are_counted_together(client):
    answer = chat(client, "assent-demo:aligned", n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({str(ids) for ids in tokens(answer)}) > 1
    assert_counts_add_up(answer.alignment, answer.usage.completion_tokens)
    # vLLM gives choice i the seed + i.
    assert tokens(answer)[1] == tokens(chat(client, "assent-demo:aligned", seed=6))[0]


def test_streaming_says_the_same_and_ends_with_the_receipt(client):
    answer = chat(client, "assent-demo:aligned", seed=9)
    chunks = list(
        chat(
            client,
            "assent-demo:aligned",
            seed=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert len(chunks) > 2  # a busy server sends several tokens at once
    assert {chunk.model for chunk in chunks} == {"assent-demo:aligned"}
    proxied = [i for i, chunk in enumerate(chunks) if "alignment" in chunk.model_extra]
    assert proxied == [0, len(chunks) - 1]
    named = {key: answer.alignment[key] for key in ("proxy", "version")}
    assert chunks[0].alignment == named
    assert chunks[-1].alignment == answer.alignment
    with client.chat.completions.stream(
        model="assent-demo:aligned",
        messages=[{"role": "user", "content": PROMPTS[0]}],
    ) as stream:
        assert stream.get_final_completion().alignment == named
    assert chunks[-1].usage == answer.usage


def test_a_streams_receipt_rides_on_the_last_chunk_of_n_choices(client):
    chunks = list(chat(client, "assent-demo:aligned", n=3, seed=5, stream=True))
    finished = [
        chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason is not None
    ]
    assert sorted(finished) == [0, 1, 2]
    assert chunks[-1].alignment == chat(client, "assent-demo:aligned", n=3, seed=5).alignment


def test_a_plain_stream_has_no_receipt(client):
    chunks = list(chat(client, stream=True))
    assert not any("alignment" in chunk.model_extra for chunk in chunks)


def test_logprobs(client):
    answer = chat(client, "assent-demo:aligned", logprobs=True, top_logprobs=5, seed=1)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 5 for entry in content)


def test_stop(client):
    full_text = chat(client, "assent-demo:aligned", seed=2).choices[0].message.content
    words = full_text.split()
    word = words[len(words) // 2]
    stopped = chat(client, "assent-demo:aligned", seed=2, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == full_text.split(word)[0]


def test_penalties(client):
    def num_repeats(**options):
        answer = chat(
            client,
            "assent-demo:aligned",
            seed=4,
            max_tokens=96,
            extra={"ignore_eos": True},
            **options,
        )
        (ids,) = tokens(answer)
        return len(ids) - len(set(ids))

    assert num_repeats(frequency_penalty=2.0, presence_penalty=2.0) < num_repeats()


def test_logit_bias(client):
    greedy_tokens = tokens(chat(client, "assent-demo:aligned", temperature=0))[0]
    answer = chat(
        client, "assent-demo:aligned", temperature=0, logit_bias={str(greedy_tokens[0]): -100}
    )
    assert tokens(answer)[0][0] != greedy_tokens[0]


def test_json_schema(client):
    for seed in range(3):
        answer = chat(
            client,
            "assent-demo:aligned",
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"enum": ["yes", "no", "perhaps"]}},
            },
        )
        assert json.loads(answer.choices[0].message.content) in ("yes", "no", "perhaps")
        assert_counts_add_up(answer.alignment, answer.usage.completion_tokens)


def test_a_regex_constrains_what_the_proxy_may_see(client):
    constraint = {"regex": r'\{"safe":(true|false),"word":"(yes|no)"\}'}
    answer = chat(
        client, "assent-demo:aligned", max_tokens=64, extra={"structured_outputs": constraint}
    )
    content = json.loads(answer.choices[0].message.content)
    assert isinstance(content["safe"], bool)
    assert content["word"] in ("yes", "no")
    assert_counts_add_up(answer.alignment, answer.usage.completion_tokens)


def test_requests_that_finish_together_get_their_own_receipts(client):
    def send(seed):
        model = ("assent-demo:aligned", "assent-demo:polite", "assent-demo")[seed % 3]
        return chat(client, model, seed=seed, max_tokens=16, extra={"ignore_eos": True})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(24)))
    for seed, answer in enumerate(answers):
        if seed % 3 == 2:
            assert "alignment" not in answer.model_extra
        else:
            assert answer.alignment["proxy"] == ("aligned", "polite")[seed % 3]
            assert_counts_add_up(answer.alignment, 16)


def test_the_openai_client_may_name_the_request(client):
    answer = chat(
        client, "assent-demo:aligned", n=2, extra_headers={"X-Request-Id": "0_a-12345678"}
    )
    assert answer.id == "chatcmpl-0_a-12345678"
    assert_counts_add_up(answer.alignment, answer.usage.completion_tokens)
