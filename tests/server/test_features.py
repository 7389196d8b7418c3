"""Every sampling feature of vLLM's keeps its meaning under a proxy: over HTTP, on the real engine.

A proxy's tokens are compared with the nucleus that transformers finds for the same text in float32.
The seeds are fixed, so the answers are too; where a control has to differ, it does so by many tokens.
Batches may round float32 differently in its last bits: a decision depends on them with a probability of about 1e-6 a
token, and where thousands are compared `almost_equal` allows for it.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import openai
import pytest
import torch

from tests.server.conftest import MODEL, WAIT_SECONDS, metric
from tests.server.feature_server import (
    ALIGNED,
    BLOCK,
    CHUNK,
    EOS,
    LORA,
    POLITE,
    FeatureClient,
    feature_server,
    is_allowed,
    logits_of,
    make_adapter,
    texts,
    tokens,
)

NUCLEUS = {"top_k": 16, "top_p": 0.95}  # the demo's generation_config.json
SLACK = 1e-3


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def llm(adapter):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other: the model is tiny
    yield make_adapter(adapter)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def feature_client(llm, adapter):
    with (
        feature_server(adapter, adapter / "server.log") as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS
        ) as client,
    ):
        yield FeatureClient(client, server.url)


def allowed_flags(llm, answer, options):
    """One bool per token of the answer: does it lie in the nucleus of these options?

    Whatever the temperature: the nucleus is that of 1, at which the proxy was trained.
    """
    prompt, options = answer.prompt_token_ids, options | {"temperature": 1.0}
    return [
        is_inside
        for token_ids in tokens(answer)
        for is_inside in is_allowed(
            logits_of(llm, prompt, token_ids, adapted=False),
            prompt,
            token_ids,
            NUCLEUS | options,
            SLACK,
        ).tolist()
    ]


NARROWED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({}, {"temperature": 2.0, "top_p": 0.5}),
    "top_k": ({}, {"top_k": 3}),
    "top_p": ({}, {"top_p": 0.5}),
    "min_p": ({}, {"min_p": 0.3}),
    "repetition_penalty": ({"top_k": 3}, {"repetition_penalty": 1.8}),
    "presence_penalty": ({"top_k": 3}, {"presence_penalty": 2.0}),
    "frequency_penalty": ({"top_k": 3}, {"frequency_penalty": 2.0}),
    "logit_bias": ({}, {"logit_bias": {"1353": -5.0, "1359": -5.0}}),
}


@pytest.mark.parametrize("name", NARROWED)
def test_the_proxy_chooses_within_the_nucleus(feature_client, llm, name):
    """Every token lies in the nucleus of its own answer, and many of the control's do not lie in the other."""
    base_options, change = NARROWED[name]
    seeds: dict[str, Any] = {"n": 8, "seed": 0, "max_tokens": 48, "ignore_eos": True}
    narrowed, control = (
        feature_client.ask(**seeds, **base_options | change),
        feature_client.ask(**seeds, **base_options),
    )
    assert all(allowed_flags(llm, narrowed, base_options | change))
    assert all(allowed_flags(llm, control, base_options))
    assert allowed_flags(llm, control, base_options | change).count(False) >= 5
    for answer in (narrowed, control):
        assert answer.alignment["rejected"] > 0
        assert answer.alignment["accepted"] + answer.alignment["forced"] == 8 * 48


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_one_candidate_is_the_greedy_token(feature_client, limit):
    """There is no choice: the text is the frozen LLM's greedy one, with nothing rejected."""
    greedy = feature_client.ask(model=MODEL, temperature=0)
    sampled = feature_client.ask(n=4, seed=0, **limit)
    assert tokens(sampled) == tokens(greedy) * 4
    assert (sampled.alignment["rejected"], sampled.alignment["forced"]) == (0, 0)
    assert tokens(greedy)[0] not in tokens(feature_client.ask(n=4, seed=0))


def test_temperature_0_asks_the_proxy_without_dice(feature_client):
    """As vLLM's greedy requests: neither seed nor top_k, top_p and min_p change the text."""
    greedy = feature_client.ask(temperature=0)
    assert tokens(feature_client.ask(temperature=0, seed=5, top_k=2, top_p=0.1)) == tokens(greedy)
    assert tokens(greedy) != tokens(feature_client.ask(model=MODEL, temperature=0))
    assert greedy.alignment["rejected"] > 0


def test_a_bias_of_100_forces_a_token(feature_client):
    token_id = 203  # a new line
    control = feature_client.ask(n=8, seed=0)
    assert not any(token_id in token_ids for token_ids in tokens(control))
    forced = feature_client.ask(n=8, seed=0, max_tokens=8, logit_bias={str(token_id): 100})
    assert tokens(forced) == [[token_id] * 8] * 8
    assert forced.alignment["rejected"] == 0


def test_bad_words_are_never_said(feature_client):
    """Words of several tokens, which the control has."""
    control = " ".join(texts(feature_client.ask(n=8, seed=0)))
    assert control.count("it after") >= 2 and control.count("Happy to help") >= 2
    answer = feature_client.ask(n=8, seed=0, bad_words=["it after", "Happy to help"])
    assert not any("it after" in text or "Happy to help" in text for text in texts(answer))
    assert answer.alignment["rejected"] > 0


def test_only_allowed_tokens_are_said(feature_client):
    allowed = [1283, 439, 319, 287, 879, 285, 1040, 30, 1353, 295]
    assert not any(
        {*token_ids} <= {*allowed} for token_ids in tokens(feature_client.ask(n=8, seed=0))
    )
    answer = feature_client.ask(n=8, seed=0, allowed_token_ids=allowed)
    assert all({*token_ids} <= {*allowed} for token_ids in tokens(answer))
    assert len({str(token_ids) for token_ids in tokens(answer)}) > 1
    assert answer.alignment["rejected"] > 0


def test_stop_strings_and_stop_tokens(feature_client):
    control = texts(feature_client.ask(n=8, seed=0))
    it_token = 295  # the token " it"
    for options, pattern in [
        ({"stop": [" from", " it"]}, r"(?=( from| it)).*"),
        ({"stop": [" it"], "include_stop_str_in_output": True}, r"(?<= it).*"),
        ({"stop_token_ids": [it_token]}, r" it.*"),
    ]:
        answer = feature_client.ask(n=8, seed=0, **options)
        assert texts(answer) == [re.sub(pattern, "", text) for text in control]
        assert all(
            len(stopped) < len(text) for stopped, text in zip(texts(answer), control, strict=True)
        )
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_min_tokens_and_max_tokens(feature_client):
    control = feature_client.ask(n=8, seed=0, max_tokens=64)
    lengths = [len(token_ids) for token_ids in tokens(control)]
    assert max(lengths) < 40 and min(lengths) > 5
    longer = feature_client.ask(n=8, seed=0, min_tokens=40, max_tokens=64)
    for control_ids, longer_ids in zip(tokens(control), tokens(longer), strict=True):
        assert len(longer_ids) > 40 and EOS not in longer_ids[:40]
        # The same until it would have ended.
        assert longer_ids[: len(control_ids) - 1] == control_ids[:-1]
    shorter = feature_client.ask(n=8, seed=0, max_tokens=5)
    assert tokens(shorter) == [token_ids[:5] for token_ids in tokens(control)]
    assert {choice.finish_reason for choice in shorter.choices} == {"length"}
    assert shorter.alignment["accepted"] + shorter.alignment["forced"] == 40


def test_n_choices_are_the_next_seeds_answers(feature_client):
    batch = tokens(feature_client.ask(n=4, seed=30))
    assert batch == [tokens(feature_client.ask(seed=30 + i))[0] for i in range(4)]
    assert len({str(token_ids) for token_ids in batch}) > 1


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"seed": 2, "temperature": 1.7, "top_k": 5}, {"temperature": 0},
     {"seed": 3, "logit_bias": {"18": -100}, "presence_penalty": 2.0}],
    ids=str,
)  # fmt: skip
def test_logprobs_are_the_frozen_llms(feature_client, llm, options):
    """They are raw: before the proxy, the temperature and the penalties."""
    answer = feature_client.ask(
        logprobs=True, top_logprobs=5, return_tokens_as_token_ids=True, **options
    )
    (token_ids,) = tokens(answer)
    expected = logits_of(llm, answer.prompt_token_ids, token_ids, adapted=False).log_softmax(-1)
    for entry, row, token in zip(
        answer.choices[0].logprobs.content, expected, token_ids, strict=True
    ):
        top = {
            int(alternative.token.removeprefix("token_id:")): alternative.logprob
            for alternative in entry.top_logprobs
        }
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert top == pytest.approx({token_id: row[token_id].item() for token_id in top}, abs=1e-3)
        assert {*row.topk(4).indices.tolist()} <= {*top}  # the emitted token takes the fifth place


SCHEMA = {
    "type": "object",
    "properties": {"safe": {"type": "boolean"}, "times": {"enum": [1, 2, 3]}},
    "required": ["safe", "times"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, tuple[dict[str, Any], str]] = {
    "choice": (
        {"structured_outputs": {"choice": ["Yes, wash it.", "No, never.", "Perhaps."]}},
        r"Yes, wash it\.|No, never\.|Perhaps\.",
    ),
    "regex": (
        {"structured_outputs": {"regex": r"(Yes|No), (wash|wipe) it( daily)?\."}},
        r"(Yes|No), (wash|wipe) it( daily)?\.",
    ),
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA},
            },
            "logit_bias": {"203": -100},  # it would fill the answer with new lines
        },
        r'\{\s*"safe"\s*:\s*(true|false)\s*,\s*"times"\s*:\s*[123]\s*\}',
    ),
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_grammar_binds_every_choice(feature_client, kind):
    options, pattern = GRAMMARS[kind]
    assert not any(re.fullmatch(pattern, text) for text in texts(feature_client.ask(n=8, seed=0)))
    answer = feature_client.ask(n=8, seed=0, max_tokens=64, **options)
    for text in texts(answer):
        assert re.fullmatch(pattern, text)
        if kind == "json_schema":
            assert set(json.loads(text)) == {"safe", "times"}
    assert len({*texts(answer)}) > 1
    assert answer.alignment["rejected"] > 0


@pytest.mark.parametrize(
    "options", [{"stop": [" it"]}, GRAMMARS["choice"][0], {"top_p": 0.6, "min_tokens": 30}], ids=str
)
def test_a_stream_says_what_the_whole_answer_says(feature_client, options):
    answer = feature_client.ask(n=3, seed=7, **options)
    parts = ["", "", ""]
    for chunk in feature_client.ask(n=3, seed=7, stream=True, **options):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts(answer)


# --- seeds: alone, in a batch of 64, in chunks, after preemption, from the prefix cache ---

CROWD = [
    (ALIGNED, "How do I look after my freezer?"),
    (POLITE, "Can I lock my pony in a hot car?"),
    (ALIGNED, "Can I open my kettle with a fork?"),
    (MODEL, "I have 55 pounds for my aquarium. Is that enough?"),
]
LONG = "I have 55 pounds for my aquarium. Is that enough? " * 12


def ask_crowd(feature_client, max_tokens, *, at_once):
    """64 texts, 16 of each of CROWD, seeds 100 i to 100 i + 15."""

    def complete_group(i):
        model, prompt = CROWD[i]
        answer = feature_client.ask(
            prompt, model, n=16, seed=100 * i, max_tokens=max_tokens, ignore_eos=True
        )
        return tokens(answer)

    with ThreadPoolExecutor(4 if at_once else 1) as pool:
        return list(pool.map(complete_group, range(4)))


def ask_single(feature_client, i, choice, max_tokens):
    model, prompt = CROWD[i]
    (token_ids,) = tokens(
        feature_client.ask(
            prompt, model, seed=100 * i + choice, max_tokens=max_tokens, ignore_eos=True
        )
    )
    return token_ids


def almost_equal(actual, expected):
    """At most two answers differ: of 10 000 tokens, three differ with a probability below 1e-6."""
    answers = [list(chain.from_iterable(responses)) for responses in (actual, expected)]
    return sum(first != second for first, second in zip(*answers, strict=True)) <= 2


def test_a_seed_says_the_same_alone_and_in_a_batch_of_64(feature_client):
    steps = metric(feature_client.url, "vllm:iteration_tokens_total_count{")
    batch = ask_crowd(feature_client, 48, at_once=True)
    steps = metric(feature_client.url, "vllm:iteration_tokens_total_count{") - steps
    assert steps < 3 * 48  # four requests one after the other would take 4 x 48
    for i in range(4):
        assert len({str(token_ids) for token_ids in batch[i]}) == 16
        for choice in (0, 15):
            assert ask_single(feature_client, i, choice, 48) == batch[i][choice]


def test_a_seed_says_the_same_after_preemption(feature_client):
    """64 answers of 110 tokens need 256 blocks, and there are 160: some are preempted and resumed."""
    num_preemptions = metric(feature_client.url, "vllm:num_preemptions_total{")
    undisturbed = ask_crowd(feature_client, 110, at_once=False)
    assert metric(feature_client.url, "vllm:num_preemptions_total{") == num_preemptions
    crowded = ask_crowd(feature_client, 110, at_once=True)
    assert metric(feature_client.url, "vllm:num_preemptions_total{") > num_preemptions + 2
    assert almost_equal(crowded, undisturbed)


@pytest.mark.parametrize("model", [ALIGNED, MODEL])
def test_a_seed_says_the_same_in_chunks_and_from_the_prefix_cache(feature_client, model):
    """A long prompt is computed in chunks unless the prefix cache knows most of it."""

    def complete(salt):
        hits = metric(feature_client.url, "vllm:prefix_cache_hits_total{")
        answer = feature_client.ask(
            LONG, model, n=2, seed=3, max_tokens=24, ignore_eos=True, cache_salt=f"{model} {salt}"
        )
        return answer, metric(feature_client.url, "vllm:prefix_cache_hits_total{") - hits

    first, _ = complete("first")
    length = len(first.prompt_token_ids)
    assert length > CHUNK
    cached, hits = complete("first")
    assert length - BLOCK <= hits / 2 <= length
    assert length - hits / 2 < CHUNK  # so this time without chunks
    assert tokens(cached) == tokens(first)
    with ThreadPoolExecutor(2) as pool:
        future = pool.submit(ask_crowd, feature_client, 32, at_once=True)
        second, _ = pool.submit(complete, "second").result()
        future.result()
    assert tokens(second) == tokens(first)


MIX = [
    {"model": ALIGNED, "seed": 1, **GRAMMARS["choice"][0]},
    {"model": MODEL, "seed": 2, "top_p": 0.8},
    {"model": POLITE, "seed": 3, "presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"model": ALIGNED, "temperature": 0},
    {"model": MODEL, "temperature": 0},
    {"model": ALIGNED, "seed": 4, "allowed_token_ids": [295, 319, 285, 287, 18], "top_k": 4},
    {"model": MODEL, "seed": 5, **GRAMMARS["regex"][0]},
    {"model": POLITE, "seed": 6, "bad_words": ["it"], "min_p": 0.05},
    {"model": ALIGNED, "seed": 7, "logit_bias": {"18": -100}, "alignment": {"strength": 4}},
    {"model": MODEL, "seed": 8, "repetition_penalty": 1.5, "logprobs": True},
    {"model": ALIGNED, "seed": 9, "stop": [" it"], "alignment": {"max_rejections": 1}},
    {"model": MODEL, "seed": 10, "min_tokens": 30, "temperature": 1.5},
    {"model": POLITE, "seed": 11, "temperature": 1.2, "alignment": {"trace": True}},
]


def test_features_beside_each_other_do_as_alone(feature_client):
    """Also rows without a proxy between proxied ones."""
    single = [tokens(feature_client.ask(**options)) for options in MIX]
    with ThreadPoolExecutor(2 * len(MIX)) as pool:
        batch = list(
            pool.map(lambda options: tokens(feature_client.ask(**options)), MIX + MIX[::-1])
        )
    assert batch == single + single[::-1]
    assert len({str(token_ids) for token_ids in single}) >= len(MIX) - 1


# --- LoRA ---


def largest_error(llm, answer, *, adapted):
    """The largest error of the answer's logprobs, against transformers'."""
    errors = []
    for choice, token_ids in zip(answer.choices, tokens(answer), strict=True):
        logits = logits_of(llm, answer.prompt_token_ids, token_ids, adapted=adapted)
        expected = logits.log_softmax(-1)[torch.arange(len(token_ids)), token_ids]
        actual = torch.tensor([entry.logprob for entry in choice.logprobs.content])
        errors.append((actual - expected).abs().max().item())
    return max(errors)


LOGPROB_OPTIONS = {"n": 8, "seed": 0, "max_tokens": 64, "logprobs": True, "ignore_eos": True}


def test_a_lora_adapter_speaks_through_the_proxy(feature_client, llm):
    unproxied, aligned = (
        feature_client.ask(model=LORA, **LOGPROB_OPTIONS),
        feature_client.ask(model=f"{LORA}:aligned", **LOGPROB_OPTIONS),
    )
    for answer in (unproxied, aligned):
        assert largest_error(llm, answer, adapted=True) < 1e-3
        assert largest_error(llm, answer, adapted=False) > 0.1
    assert aligned.model == f"{LORA}:aligned"
    assert aligned.alignment["proxy"] == "aligned"
    assert aligned.alignment["rejected"] > 0
    assert tokens(aligned) != tokens(unproxied)
    at_strength_0 = feature_client.ask(
        model=f"{LORA}:aligned", alignment={"strength": 0}, **LOGPROB_OPTIONS
    )
    assert tokens(at_strength_0) == tokens(unproxied)


def test_the_frozen_llm_stays_frozen_beside_an_adapter(feature_client, llm):
    models = [LORA, MODEL, f"{LORA}:aligned", ALIGNED]
    single_answers = [feature_client.ask(model=model, **LOGPROB_OPTIONS) for model in models]
    with ThreadPoolExecutor(4) as pool:
        batch_answers = list(
            pool.map(lambda model: feature_client.ask(model=model, **LOGPROB_OPTIONS), models)
        )
    for model, answer in zip(models, batch_answers, strict=True):
        assert largest_error(llm, answer, adapted=model.startswith(LORA)) < 1e-3
    assert almost_equal(map(tokens, batch_answers), map(tokens, single_answers))


@pytest.mark.parametrize("model", [LORA, ALIGNED, MODEL])
def test_prompt_logprobs_with_lora_are_refused(feature_client, model):
    """They would crash vLLM's CPU engine."""
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        feature_client.ask(model=model, prompt_logprobs=1)
    with pytest.raises(openai.BadRequestError):
        feature_client.client.completions.create(model=model, prompt="Hello", echo=True, logprobs=1)
    assert feature_client.ask(model=model).usage.completion_tokens > 0
