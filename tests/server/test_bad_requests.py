"""Every bad chat request gets its 4xx in OpenAI's shape, and the server answers the next one."""

import pytest

MESSAGES = [{"role": "user", "content": "My desk is much better now."}]
ANTHROPIC_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
GOOD = {"model": "assent-demo", "messages": MESSAGES, "max_tokens": 4}


def post(http, body, path="/v1/chat/completions"):
    if isinstance(body, str):
        return http.post(path, content=body, headers={"Content-Type": "application/json"})
    return http.post(path, json=body)


@pytest.fixture(autouse=True)
def still_answers(http):
    yield
    assert post(http, GOOD).status_code == 200


def assert_refused(answer, code, *messages):
    """In OpenAI's shape, or in Anthropic's where the route is Anthropic's."""
    error = answer.json()["error"]
    assert answer.status_code == code, answer.text
    if answer.request.url.path.startswith("/v1/messages"):
        assert answer.json()["type"] == "error" and set(error) == {"type", "message"}
        assert error["type"] == ANTHROPIC_TYPES[code]
    else:
        assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    for message in messages:
        assert message in error["message"]


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ({"proxy": "aligned", "strength": -0.1}, "strength"),
        ({"proxy": "aligned", "strength": 16.5}, "strength"),
        ({"proxy": "aligned", "strength": "strong"}, "strength"),
        ({"proxy": "aligned", "max_rejections": -1}, "max_rejections"),
        ({"proxy": "aligned", "max_rejections": 1.5}, "max_rejections"),
        ({"proxy": "aligned", "best_of": 0}, "best_of"),
        ({"proxy": "aligned", "best_of": 65}, "best_of"),
        ({"proxy": "aligned", "strenght": 1}, "strenght"),
        ({"proxy": 7}, "proxy"),
        ("aligned", "alignment"),
        (["aligned"], "alignment"),
        ({"strength": 2}, "alignment.proxy"),
        ({"trace": True}, "alignment.proxy"),
        ({"proxy": "aligned", "trace": "perhaps"}, "trace"),
        ({"proxy": "aligned", "trace": True, "best_of": 2}, "trace"),
        ({"proxy": "aligned", "version": "0"}, "version"),
        ({"proxy": "aligned", "shadow": False}, "shadow"),
        ({"max_rejections": 2}, "alignment.proxy"),
        ({"judge": {}}, "best_of"),
        ({"best_of": 2, "judge": {"seed": -1}}, "seed"),
        ({"best_of": 2, "judge": {"principles": ["loudness"]}}, "loudness"),
        ({"best_of": 2, "judge": {"strategy": "rank"}}, "strategy"),
        ({"sample_timeout": 1}, "best_of"),
        ({"best_of": 2, "sample_timeout": 0}, "sample_timeout"),
    ],
)
def test_alignment_that_cannot_be(http, alignment, message):
    assert_refused(post(http, GOOD | {"alignment": alignment}), 400, message)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_strength_that_is_not_finite(http, value):
    body = (
        '{"model": "assent-demo:aligned", "messages": [{"role": "user", "content": "Hi."}],'
        f' "alignment": {{"strength": {value}}}}}'
    )
    assert_refused(post(http, body), 400, "strength")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 3}, "n must be 2 at most"),
        ({"temperature": 0}, "temperature"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ""),
    ],
)
def test_best_of_does_not_go_with(http, change, message):
    assert_refused(post(http, GOOD | {"alignment": {"best_of": 2}} | change), 400, message)


def test_a_proxy_does_not_go_with_beam_search(http):
    body = GOOD | {"model": "assent-demo:aligned", "use_beam_search": True, "n": 2}
    assert_refused(post(http, body), 400, "use_beam_search")


def test_an_unknown_proxy_is_a_404_that_names_the_loaded_ones(http):
    answer = post(http, GOOD | {"alignment": {"proxy": "stern"}})
    assert_refused(answer, 404, "'stern'", "aligned, polite")
    assert_refused(
        post(http, GOOD | {"model": "assent-demo:stern"}), 404, "'stern'", "aligned, polite"
    )


def test_an_unknown_model(http):
    assert_refused(post(http, GOOD | {"model": "nobody"}), 404, "nobody")
    assert_refused(post(http, GOOD | {"model": "nobody:aligned"}), 404, "nobody:aligned")


def test_two_different_proxies(http):
    body = GOOD | {"model": "assent-demo:polite", "alignment": {"proxy": "aligned"}}
    assert_refused(post(http, body), 400, "polite", "aligned")


def test_the_same_proxy_twice_is_fine(http):
    body = GOOD | {"model": "assent-demo:polite", "alignment": {"proxy": "polite"}}
    assert post(http, body).json()["alignment"]["proxy"] == "polite"


@pytest.mark.parametrize("value", ["x", 3, {"proxy": "aligned"}, [1], None])
def test_vllm_xargs_is_no_back_door(http, value):
    assert_refused(
        post(http, GOOD | {"vllm_xargs": {"alignment": value}}), 400, "`alignment` object"
    )


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "",
        "[]",
        '"text"',
        "null",
        '{"model": "assent-demo"}',
        '{"model": {"assent-demo": "aligned"}}',
        '{"alignment": ' + "[" * 100_000,
        '{"alignment": {"proxy": "aligned"}} {}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/judge", "/proxies"])
def test_malformed_bodies(http, path, body):
    assert_refused(post(http, body, path), 400)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/judge"])
def test_another_media_type(http, path):
    assert_refused(http.post(path, content="prompt=x"), 400, "application/json")


@pytest.mark.parametrize("model", ["assent-demo", "assent-demo:aligned"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(http, model, stream):
    long_messages = [{"role": "user", "content": "word " * 3000}]
    body = GOOD | {"model": model, "messages": long_messages, "stream": stream}
    assert_refused(post(http, body), 400, "1024")


def test_unknown_paths_and_methods(http):
    assert_refused(http.get("/nowhere"), 404)
    assert_refused(http.get("/judge/rank"), 405)
    assert_refused(http.put("/proxies"), 405)


def test_a_client_that_goes_away_in_the_middle(http):
    body = GOOD | {"model": "assent-demo:aligned", "max_tokens": 512, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())


PAIR = {"prompt": "x", "response_a": "a", "response_b": "b"}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/judge", PAIR | {"response_b": 3}, "response_b", "Input should be a valid string"),
        ("/judge", {"prompt": "x"}, None, "response_a and response_b are both needed"),
        ("/feedback", PAIR | {"better": "c"}, "better", "Input should be 'a' or 'b'"),
        ("/judge", "{", None, "the body is not JSON: "),
        ("/positions", {}, "responses", "Field required"),
        ("/v1/chat/completions", {"model": "assent-demo"}, "messages", "Field required"),
        ("/v1/chat/completions", GOOD | {"n": "x"}, "n", "Input should be a valid integer, "),
    ],
)
def test_a_body_that_does_not_fit_is_named_in_one_line(http, path, body, param, message):
    """The field and the reason, and nothing of Python's."""
    error = post(http, body, path).json()["error"]
    assert error["code"] == 400 and error["param"] == param
    assert error["message"].startswith(f"{param}: {message}" if param else message)
    assert not set("\n{<") & set(error["message"])


def test_many_errors_are_counted(http):
    body = {"responses": [{"prompt": [-1], "response": [-1]}] * 3}
    message = post(http, body, "/positions").json()["error"]["message"]
    assert message.count("responses.") == 3 and message.endswith("; and 3 more")
