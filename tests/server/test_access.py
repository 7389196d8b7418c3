"""The API key, and the routes that say what is there."""

import httpx
import openai
import pytest

GUARDED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/judge"),
    ("GET", "/proxies"),
    ("POST", "/proxies"),
    ("DELETE", "/proxies/aligned"),
    ("POST", "/v1/messages"),
    ("GET", "/metrics"),
    ("GET", "/metrics/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/version"),
    ("POST", "/tokenize"),
    ("POST", "/invocations"),
    ("GET", "/nowhere"),
    ("GET", "/health/x"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Basic sk-the-tests"])
def test_no_way_in_without_the_key(server, method, path, key):
    headers = {"Authorization": key} if key else {}
    answer = httpx.request(method, server.url + path, headers=headers)
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("AuthenticationError", 401)
    assert "Authorization: Bearer" in error["message"]


def test_health_is_open(server):
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_openai_client_understands_the_401(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="needs an API key"),
    ):
        client.models.list()


def test_without_the_key_nothing_is_read(server):
    """The key comes before the gate: a body that it would refuse gets the same 401."""
    body = {"model": "assent-demo:nobody", "alignment": {"strength": -1}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 401


def test_models(client):
    models = {model.id: model for model in client.models.list().data}
    assert list(models) == ["assent-demo", "assent-demo:aligned", "assent-demo:polite"]
    assert models["assent-demo:polite"].parent == "assent-demo"
    assert models["assent-demo:polite"].max_model_len == models["assent-demo"].max_model_len


def test_proxies(http, client):
    listed = {proxy["name"]: proxy for proxy in http.get("/proxies").json()["data"]}
    assert set(listed) == {"aligned", "polite"}
    answer = client.chat.completions.create(
        model="assent-demo:aligned", messages=[{"role": "user", "content": "Hi."}], max_tokens=1
    )
    assert answer.alignment["version"] == listed["aligned"]["version"]
    assert listed["aligned"]["version"] != listed["polite"]["version"]
    assert listed["aligned"]["training"]


def test_metrics_are_vllms_and_ours(http, client):
    def read():
        lines = http.get("/metrics").text.splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line[0] != "#"
        }

    before = read()
    answer = client.chat.completions.create(
        model="assent-demo:polite",
        messages=[{"role": "user", "content": "Hi."}],
        max_tokens=8,
        extra_body={"alignment": {"best_of": 3}},
    )
    after = read()

    def rise(name):
        return after[name] - before.get(name, 0)

    alignment = answer.alignment
    labels = f'{{proxy="polite",version="{alignment["version"]}"}}'
    assert rise(f"assent_candidates_proposed_total{labels}") == alignment["proposed"]
    assert rise(f"assent_candidates_rejected_total{labels}") == alignment["rejected"]
    assert rise("assent_best_of_samples_total") == 3
    assert (
        rise('assent_judge_tokens_total{kind="prompt"}')
        == (alignment["judge"]["usage"]["prompt_tokens"])
    )
    verdicts = [name for name in after if name.startswith("assent_verdicts_total")]
    assert sum(map(rise, verdicts)) == 2
    assert any(name.startswith("vllm:generation_tokens_total") for name in after)


def test_docs_know_our_routes(http):
    assert http.get("/docs").status_code == 200
    described = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/judge", "/proxies"} <= set(described["paths"])
    assert {"get", "post"} <= set(described["paths"]["/proxies"])
    assert {"200", "201", "400", "403", "409"} <= set(
        described["paths"]["/proxies"]["post"]["responses"]
    )
    for request in ("ChatRequest", "TextRequest"):
        assert "alignment" in described["components"]["schemas"][request]["properties"]
