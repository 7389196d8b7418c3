"""A proxy on vLLM's other routes: honoured or refused in plain words, and never ignored."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.test_bad_requests import assert_refused

MESSAGES = [{"role": "user", "content": "How do I look after my freezer?"}]
PROMPT = "<|user|>How do I look after my freezer?<|end|><|assistant|>"

# route -> a small request, without the model
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 8},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 8},
    "/v1/responses": {"input": MESSAGES, "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 8}},
    "/invocations": {"messages": MESSAGES, "max_tokens": 8},
}
STREAMING_ROUTES = sorted(set(ROUTES) - {"/v1/chat/completions/batch"})


def num_aligned_tokens(http, proxy="aligned"):
    """How many tokens the proxy has decided since the server started."""
    # Taking a request's counts makes the worker update its counters.
    body = {"model": "assent-demo:polite", "messages": MESSAGES, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in http.get("/metrics").text.splitlines()
        if line.startswith(f'assent_tokens_aligned_total{{proxy="{proxy}"')
    )


def version_of(http, name):
    (version,) = (
        proxy["version"] for proxy in http.get("/proxies").json()["data"] if proxy["name"] == name
    )
    return version


def events(answer):
    return [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_the_models_name_chooses_a_proxy_on_every_route(http, path):
    num_before = num_aligned_tokens(http)
    body = ROUTES[path] | {"model": "assent-demo:aligned"}
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "assent-demo:aligned"
    assert answer.headers["assent-proxy"] == f"aligned@{version_of(http, 'aligned')}"
    usage = answer.json()["usage"]
    assert num_aligned_tokens(http) - num_before == usage.get(
        "completion_tokens", usage.get("output_tokens")
    )


@pytest.mark.parametrize("path", STREAMING_ROUTES)
def test_streamed_as_well(http, path):
    num_before = num_aligned_tokens(http)
    answer = http.post(path, json=ROUTES[path] | {"model": "assent-demo:aligned", "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["assent-proxy"] == f"aligned@{version_of(http, 'aligned')}"
    assert 0 < num_aligned_tokens(http) - num_before <= 8
    models = [
        event.get("model") or event.get("message", event.get("response", {})).get("model")
        for event in events(answer)
    ]
    assert set(models) - {None} <= {"assent-demo:aligned"}
    if path != "/inference/v1/generate":  # whose chunks name no model
        assert "assent-demo:aligned" in models


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_without_a_proxy_nothing_is_said_of_one(http, path):
    num_before = num_aligned_tokens(http)
    answer = http.post(path, json=ROUTES[path] | {"model": "assent-demo"})
    assert answer.status_code == 200
    assert answer.json()["model"] == "assent-demo"
    assert "assent-proxy" not in answer.headers
    assert "alignment" not in answer.json()
    assert num_aligned_tokens(http) == num_before


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_the_alignment_object_is_understood_on_every_route(http, path):
    """With no rejections allowed every proxy gives the most probable tokens."""
    alignment = {"proxy": "aligned", "max_rejections": 0}
    body = ROUTES[path] | {"model": "assent-demo", "alignment": alignment}
    first, second = http.post(path, json=body), http.post(path, json=body)
    assert first.headers["assent-proxy"].split("@")[0] == "aligned"

    def without_ids(answer):
        random_keys = {"id", "created", "created_at", "request_id", "system_fingerprint"}
        data = {key: value for key, value in answer.json().items() if key not in random_keys}
        for item in data.get("output", ()):
            item.pop("id", None)
        return data

    assert without_ids(first) == without_ids(second)
    body["alignment"] = {"proxy": "aligned", "strength": -1}
    assert_refused(http.post(path, json=body), 400, "strength")


@pytest.mark.parametrize("path", sorted(ROUTES))
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_proxy(http, path, stream):
    if stream and path not in STREAMING_ROUTES:
        stream = False
    for change in ({"model": "assent-demo:stern"}, {"alignment": {"proxy": "stern"}}):
        answer = http.post(path, json=ROUTES[path] | {"stream": stream} | change)
        assert_refused(answer, 404, "'stern'", "aligned, polite")


@pytest.mark.parametrize("path", sorted(set(ROUTES) - {"/v1/chat/completions"}))
def test_best_of_is_for_chat_only(http, path):
    answer = http.post(path, json=ROUTES[path] | {"alignment": {"best_of": 2}})
    assert_refused(answer, 400, "best_of", "/v1/chat/completions only")


@pytest.mark.parametrize("path", sorted(set(ROUTES) - {"/v1/chat/completions", "/v1/completions"}))
def test_a_trace_needs_an_answer_that_can_carry_it(http, path):
    fields = {"alignment": {"proxy": "aligned", "trace": True}}
    assert_refused(http.post(path, json=ROUTES[path] | fields), 400, "trace")


def test_a_proxy_does_not_go_with_a_background_response(http):
    body = {"model": "assent-demo:aligned", "input": "Hi.", "background": True}
    assert_refused(http.post("/v1/responses", json=body), 400, "background")


@pytest.mark.parametrize(
    "path",
    [
        "/generative_scoring",
        "/v1/systemone",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/detokenize",
        "/judge",
        "/no/such/route",
    ],
)
def test_other_routes_refuse_a_proxy(http, path):
    assert_refused(http.post(path, json={"model": "assent-demo:aligned"}), 400, "'aligned'", path)
    assert_refused(
        http.post(path, json={"alignment": {"proxy": "aligned"}}), 400, "`alignment`", path
    )


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_counting_tokens_takes_the_models_name_with_a_proxy(http, path):
    with_proxy = http.post(path, json={"model": "assent-demo:aligned", "messages": MESSAGES})
    without_proxy = http.post(path, json={"model": "assent-demo", "messages": MESSAGES})
    assert with_proxy.json() == without_proxy.json()
    unknown_body = {"model": "assent-demo:stern", "messages": MESSAGES}
    assert_refused(http.post(path, json=unknown_body), 404, "'stern'")
    assert_refused(
        http.post(path, json=unknown_body | {"alignment": {}, "model": "assent-demo"}), 400, path
    )


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_the_alignment_object_in_a_header(http, path):
    alignment = {"proxy": "aligned", "max_rejections": 0}
    body = ROUTES[path] | {"model": "assent-demo"}
    header = {"Assent-Alignment": json.dumps(alignment)}
    for fields in ({}, {"alignment": alignment}, {"alignment": None}):
        answer = http.post(path, json=body | fields, headers=header)
        assert answer.headers["assent-proxy"].split("@")[0] == "aligned", answer.text
    other = body | {"alignment": {"proxy": "polite"}}
    refused = http.post(path, json=other, headers=header)
    assert_refused(refused, 400, "Assent-Alignment", "differs from the body's")
    refused = http.post(path, json=body, headers={"Assent-Alignment": '{"strenght": 1}'})
    assert_refused(refused, 400, "alignment.strenght")


def test_the_header_means_nothing_to_other_routes(http):
    header = {"Assent-Alignment": '{"proxy": "aligned"}'}
    answer = http.post("/judge", json={}, headers=header)
    assert_refused(answer, 400, "`alignment` means nothing to /judge")
    body = {"model": "assent-demo", "messages": MESSAGES}
    for path in ("/tokenize", "/v1/messages/count_tokens"):  # which may count for such a request
        assert http.post(path, json=body, headers=header).status_code == 200
        assert_refused(http.post(path, json=body, headers={"Assent-Alignment": "{"}), 400, "JSON")


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_what_belongs_into_alignment(http, path):
    body = ROUTES[path] | {"model": "assent-demo"}
    refused = http.post(path, json=body | {"strength": 2})
    assert_refused(refused, 400, 'send {"alignment": {"strength": 2}}')
    assert_refused(http.post(path, json=body | {"alignement": {}}), 400, "did you mean `alignment`")
    assert http.post(path, json=body | {"unknown": 1, "strength": None}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_log_likelihoods_under_a_proxy_are_refused(http, stream):
    """They would be the frozen LLM's, without a word."""
    requests = [
        ("/v1/completions", {"echo": True, "logprobs": 1, "stream": stream}),
        ("/v1/completions", {"prompt_logprobs": 1}),
        ("/v1/chat/completions", {"prompt_logprobs": 1}),
        ("/inference/v1/generate", {"sampling_params": {"max_tokens": 1, "prompt_logprobs": 1}}),
    ]
    for path, options in requests:
        body = ROUTES[path] | {"max_tokens": 1} | options
        answer = http.post(path, json=body | {"model": "assent-demo:aligned"})
        assert_refused(answer, 400, "log-likelihoods", "'aligned'")
        assert http.post(path, json=body | {"model": "assent-demo"}).status_code == 200
    body = ROUTES["/v1/completions"] | {"echo": True, "logprobs": 1, "model": "assent-demo"}
    frozen = body | {"alignment": {"proxy": "aligned", "strength": 0}}
    assert http.post("/v1/completions", json=frozen).status_code == 200


# --- nonsense in raw extra arguments ---

NONSENSE = [
    '"x"',
    "3",
    "true",
    "[1]",
    '{"alignment": null}',
    '{"alignment": "x"}',
    '{"alignment": {"proxy": "aligned"}}',
    '{"alignment": {"shadow": false}}',
    '{"a": 1000000000000000000000000000000}',
    '{"a": "\\ud800"}',
    '{"kv_transfer_params": "x"}',
    '{"ec_transfer_params": 3}',
]


@pytest.mark.parametrize("path", sorted(ROUTES))
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_in_extra_arguments(http, path, nonsense):
    body = json.loads(json.dumps(ROUTES[path] | {"model": "assent-demo"}))
    if path == "/inference/v1/generate":
        body["sampling_params"]["extra_args"] = "@"
    else:
        body["vllm_xargs"] = "@"
    for stream in [False] + [True] * (path in STREAMING_ROUTES):
        content = json.dumps(body | {"stream": stream}).replace('"@"', nonsense)
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        expected = ["reserved"] if "alignment" in nonsense else []
        assert answer.status_code == 400, answer.text
        assert all(word in answer.text for word in expected)
    assert http.get("/health").status_code == 200


def test_extra_arguments_that_make_sense_still_pass(http):
    body = ROUTES["/v1/completions"] | {"model": "assent-demo:aligned", "seed": 1}
    without_extra = http.post("/v1/completions", json=body).json()
    with_extra = http.post("/v1/completions", json=body | {"vllm_xargs": {"mine": [1, "a"]}}).json()
    assert with_extra["choices"] == without_extra["choices"]
    assert with_extra["alignment"] == without_extra["alignment"]


# --- /v1/completions ---


def complete(http, **options):
    answer = http.post(
        "/v1/completions", json=ROUTES["/v1/completions"] | {"model": "assent-demo"} | options
    )
    assert answer.status_code == 200, answer.text
    return answer


def test_a_completion_has_a_receipt(http):
    by_name = complete(http, model="assent-demo:aligned", alignment={}, seed=1).json()
    by_object = complete(http, alignment={"proxy": "aligned"}, seed=1).json()
    assert by_name["choices"] == by_object["choices"]
    assert by_name["alignment"] == by_object["alignment"]
    alignment = by_name["alignment"]
    assert (alignment["proxy"], alignment["version"]) == ("aligned", version_of(http, "aligned"))
    assert alignment["accepted"] + alignment["forced"] == by_name["usage"]["completion_tokens"] == 8
    assert alignment["accepted"] + alignment["rejected"] == alignment["proposed"]
    # Without the alignment object there are no counts: they need a call of the engine.
    short_alignment = complete(http, model="assent-demo:aligned", seed=1).json()["alignment"]
    assert short_alignment == {key: alignment[key] for key in ("proxy", "version")}


def test_prompts_and_samples_are_counted_together(http):
    answer = complete(
        http,
        model="assent-demo:aligned",
        prompt=[PROMPT, "Hello", "How"],
        n=2,
        ignore_eos=True,
        alignment={},
    ).json()
    assert len(answer["choices"]) == 6
    alignment = answer["alignment"]
    assert alignment["accepted"] + alignment["forced"] == 6 * 8


def test_a_streamed_completion_ends_with_the_receipt(http):
    answer = complete(http, model="assent-demo:aligned", seed=1).json()
    chunks = events(complete(http, model="assent-demo:aligned", seed=1, stream=True))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == answer["choices"][0]["text"]
    assert [chunk for chunk in chunks if "alignment" in chunk] == [chunks[0], chunks[-1]]
    assert chunks[0]["alignment"] == chunks[-1]["alignment"] == answer["alignment"]


def test_strength_0_completes_as_the_frozen_llm(http):
    answer = complete(http, alignment={"proxy": "aligned", "strength": 0}, seed=5).json()
    assert answer["choices"] == complete(http, seed=5).json()["choices"]
    assert answer["alignment"]["proposed"] == 0


def test_two_requests_of_one_id_get_their_own_receipts(http):
    """Clients choose ids; none may get another's counts."""

    def send(num_tokens):
        body = ROUTES["/v1/completions"] | {"max_tokens": num_tokens, "ignore_eos": True}
        return http.post(
            "/v1/completions",
            json=body | {"model": "assent-demo:aligned", "alignment": {}},
            headers={"X-Request-Id": "the-same"},
        ).json()

    with ThreadPoolExecutor(8) as pool:
        for num_tokens, answer in zip(range(20, 36), pool.map(send, range(20, 36)), strict=True):
            alignment = answer["alignment"]
            assert alignment["accepted"] + alignment["forced"] == num_tokens
