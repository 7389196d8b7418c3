"""Keys, administrators and limits, and the routes that list models and proxies."""

import asyncio
import hashlib
import re
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.conftest import ADMIN_KEY, API_KEY, JUDGING_KEY, LIMITED_KEY, WAIT_SECONDS

GUARDED = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/judge"),
    ("GET", "/proxies"),
    ("POST", "/proxies"),
    ("DELETE", "/proxies/aligned"),
    ("POST", "/positions"),
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
    ("GET", "/page"),
    ("GET", "/proxies/aligned/card"),
    ("GET", "/feedback"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("key", [None, "Bearer wrong", "Basic sk-the-tests"])
def test_no_way_in_without_the_key(server, method, path, key):
    headers = {"Authorization": key} if key else {}
    answer = httpx.request(method, server.url + path, headers=headers)
    assert answer.status_code == 401
    error = answer.json()["error"]
    anthropics = path == "/v1/messages"
    assert error["type"] == ("authentication_error" if anthropics else "AuthenticationError")
    assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/page/app.js"])
def test_what_is_open(server, path):
    assert httpx.get(f"{server.url}{path}", timeout=WAIT_SECONDS).status_code == 200


def test_the_openai_client_understands_the_401(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="needs an API key"),
    ):
        client.models.list()


def test_without_the_key_nothing_is_read(server):
    """The key is checked before the body: a body that would be refused gets the same 401."""
    body = {"model": "assent-demo:nobody", "alignment": {"strength": -1}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 401


def test_only_an_administrator_changes_proxies(server):
    for key, status in ((API_KEY, 403), (LIMITED_KEY, 403), (ADMIN_KEY, 404)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.delete(f"{server.url}/proxies/nobody", headers=headers)
        assert answer.status_code == status
        assert httpx.get(f"{server.url}/proxies", headers=headers).status_code == 200
    body = {"name": "mine", "path": "v1"}
    answer = httpx.post(
        f"{server.url}/proxies", json=body, headers={"Authorization": f"Bearer {API_KEY}"}
    )
    assert answer.status_code == 403
    assert "ASSENT_ADMIN_KEYS" in answer.json()["error"]["message"]


def test_other_origins_are_not_allowed(server):
    """A browser sends a preflight request, without the key. The response does not let a page go on."""
    preflight_headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{server.url}/v1/chat/completions", headers=preflight_headers)
    assert "access-control-allow-origin" not in answer.headers
    answer = httpx.get(f"{server.url}/health", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_keys_are_in_no_log(server):
    for key in ("sk-a-wrong-one", API_KEY):
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": "nobody", "messages": []}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code in (400, 401, 404) and key not in answer.text
    log = server.log.read_text(errors="replace")
    assert "non-default args" in log  # where vLLM would show them
    for key in ("sk-a-wrong-one", API_KEY, ADMIN_KEY, LIMITED_KEY):
        assert key not in log
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    for pid in children.split():
        assert ADMIN_KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


TURN = [{"role": "user", "content": "Hi."}]
LONG = [{"role": "user", "content": "Hi there. " * 20}]


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("v1/chat/completions", {"messages": TURN, "n": 3}, "max_samples: .*3 answers.*have 2"),
        (
            "v1/chat/completions",
            {"messages": TURN, "alignment": {"best_of": 4}},
            "max_samples: .*4 answers",
        ),
        ("v1/completions", {"prompt": ["a", "b"], "n": 2}, "max_samples: .*4 answers"),
        ("v1/chat/completions", {"messages": TURN, "n": "64"}, "max_samples: .*64 samples"),
        ("v1/chat/completions/batch", {"messages": [TURN] * 3}, "max_samples: .* 3 "),
        (
            "inference/v1/generate",
            {"token_ids": [5, 6], "sampling_params": {"n": 8, "max_tokens": 2}},
            "max_samples: .*8 samples",
        ),
        (
            "generative_scoring",
            {"query": "a", "items": ["b"] * 3, "label_token_ids": [5, 6]},
            "max_samples: .*3 samples",
        ),
        (
            "v1/chat/completions",
            {"messages": TURN, "alignment": {"proxy": "aligned", "trace": True}},
            "alignment.trace is not open to this key",
        ),
        ("v1/chat/completions", {"messages": LONG}, "max_prompt_tokens: .* may send 40"),
        (
            "v1/chat/completions",
            {"messages": LONG, "alignment": {"proxy": "aligned"}, "stream": True},
            "max_prompt_tokens: .* may send 40",
        ),
        ("v1/completions", {"prompt": "Hi there. " * 20}, "max_prompt_tokens: .* may send 40"),
        (
            "judge",
            {"prompt": "Hi there. " * 20, "response_a": "a", "response_b": "b"},
            "max_prompt_tokens: .* may send 40",
        ),
    ],
)
def test_the_limits_of_a_key(server, route, body, message):
    body = {"model": "assent-demo", "max_tokens": 2} | body
    if route.startswith("judge"):
        body = {key: value for key, value in body.items() if key not in ("model", "max_tokens")}
    for key, status in ((LIMITED_KEY, 400), (API_KEY, 200)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(
            f"{server.url}/{route}", json=body, headers=headers, timeout=WAIT_SECONDS
        )
        assert answer.status_code == status, answer.text
        if status == 400:
            assert re.search(message, answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("judge", {"pairs": [{"prompt": "a", "response_a": "b", "response_b": "c"}] * 3}),
        ("judge/rank", {"prompt": "a", "responses": ["b", "c", "d"], "strategy": "round-robin"}),
        (
            "v1/chat/completions",
            {"model": "assent-demo", "messages": TURN, "alignment": {"best_of": 8}},
        ),
    ],
)
def test_judgments_count(server, route, body):
    headers = {"Authorization": f"Bearer {JUDGING_KEY}"}
    url = f"{server.url}/{route}"
    answer = httpx.post(url, json=body, headers=headers, timeout=WAIT_SECONDS)
    assert answer.status_code == 400
    assert re.search("max_judgments: .* may have 4", answer.json()["error"]["message"])


def test_within_its_limits_a_key_may_do_all(server):
    """The judge of a best-of-N reads more than the prompt. The key's limits do not count that."""
    body = {
        "model": "assent-demo:aligned",
        "messages": [{"role": "user", "content": "Can I open my kettle with a fork?"}],
        "alignment": {"best_of": 2},
    }
    headers = {"Authorization": f"Bearer {LIMITED_KEY}"}
    url = f"{server.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=headers, timeout=WAIT_SECONDS)
    assert len(answer.json()["alignment"]["judge"]["rounds"]) == 1


def test_models(client):
    models = {model.id: model for model in client.models.list().data}
    assert list(models) == ["assent-demo", "assent-demo:aligned", "assent-demo:polite"]
    assert models["assent-demo:polite"].parent == "assent-demo"
    for name, model in models.items():
        assert client.models.retrieve(name).parent == model.parent
    with pytest.raises(openai.NotFoundError, match="'assent-demo:stern' does not exist"):
        client.models.retrieve("assent-demo:stern")
    assert models["assent-demo:polite"].max_model_len == models["assent-demo"].max_model_len


def test_proxies(http, client):
    proxies = {proxy["name"]: proxy for proxy in http.get("/proxies").json()["data"]}
    assert set(proxies) == {"aligned", "polite"}
    answer = client.chat.completions.create(
        model="assent-demo:aligned", messages=[{"role": "user", "content": "Hi."}], max_tokens=1
    )
    assert answer.alignment["version"] == proxies["aligned"]["version"]
    assert proxies["aligned"]["version"] != proxies["polite"]["version"]
    assert proxies["aligned"]["training"]


def test_where_files_lie_is_for_administrators(server):
    def read_data(key, path):
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{server.url}{path}", headers=headers).json()["data"]

    assert all("directory" in proxy for proxy in read_data(ADMIN_KEY, "/proxies"))
    assert not any("directory" in proxy for proxy in read_data(API_KEY, "/proxies"))
    assert {model["root"] for model in read_data(API_KEY, "/v1/models")} == {"assent-demo"}
    assert all("/" in model["root"] for model in read_data(ADMIN_KEY, "/v1/models"))


@pytest.mark.parametrize(
    ("request_id", "expected"), [("abc-123", "abc-123"), ("x" * 200, None), (None, None)]
)
def test_the_request_id_is_repeated(http, request_id, expected):
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    assert http.get("/v1/models", headers=headers).headers.get("x-request-id") == expected


@pytest.mark.parametrize(
    "name", ["..", ".", "-x", "a" * 129, "a/b", "\U0001f600", "a\r\nb", "", "a b"]
)
def test_names_that_no_proxy_may_have(http, name):
    answer = http.post("/proxies", json={"name": name, "path": "v1"})
    assert answer.status_code == 400
    assert len(answer.content) < 2000


def test_metrics_are_vllms_and_ours(http, client):
    def read_metrics():
        lines = http.get("/metrics").text.splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line[0] != "#"
        }

    before = read_metrics()
    answer = client.chat.completions.create(
        model="assent-demo:polite",
        messages=[{"role": "user", "content": "Hi."}],
        max_tokens=8,
        extra_body={"alignment": {"best_of": 3}},
    )
    after = read_metrics()

    def increase(name):
        return after[name] - before.get(name, 0)

    alignment = answer.alignment
    labels = f'{{proxy="polite",version="{alignment["version"]}"}}'
    assert increase(f"assent_candidates_proposed_total{labels}") == alignment["proposed"]
    assert increase(f"assent_candidates_rejected_total{labels}") == alignment["rejected"]
    assert increase("assent_best_of_samples_total") == 3
    assert (
        increase('assent_judge_tokens_total{kind="prompt"}')
        == (alignment["judge"]["usage"]["prompt_tokens"])
    )
    verdicts = [name for name in after if name.startswith("assent_verdicts_total")]
    assert sum(map(increase, verdicts)) == 2
    assert any(name.startswith("vllm:generation_tokens_total") for name in after)


def test_docs_know_our_routes(http):
    assert http.get("/docs").status_code == 200
    openapi = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/models", "/judge", "/proxies"} <= set(openapi["paths"])
    assert {"get", "post"} <= set(openapi["paths"]["/proxies"])
    assert {"200", "201", "400", "403", "409"} <= set(
        openapi["paths"]["/proxies"]["post"]["responses"]
    )
    for request in ("ChatRequest", "TextRequest"):
        assert "alignment" in openapi["components"]["schemas"][request]["properties"]


def make_access(**settings):
    from server.access import Access, Caller, Limits

    limits = Limits(**settings)
    callers = {hashlib.sha256(b"key").digest(): Caller("one", limits)}
    return Access(callers, Caller("anybody", limits))


async def send_request(middleware, body, headers, method="POST", path="/v1/x", **scope):
    """The status and the headers of an answer."""
    messages = []
    chunks = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in body]
    chunks.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        return chunks.pop(0)

    async def send(message):
        messages.append(message)

    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw_headers, **scope}
    await middleware(scope, receive, send)
    return messages[0]["status"], {
        name.decode(): value.decode() for name, value in messages[0]["headers"]
    }


async def reading_app(scope, receive, send):
    """An app that reads all of the body and then answers."""
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_requests_a_minute(monkeypatch):
    from server.middleware import access

    now = [100.0]
    monkeypatch.setattr("server.access.monotonic", lambda: now[0])
    middleware = access.AccessMiddleware(
        reading_app, make_access(requests_per_minute=3), max_body_bytes=100
    )
    key = {"Authorization": "Bearer key"}
    statuses = [asyncio.run(send_request(middleware, [], key))[0] for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    now[0] += 19.9  # of the 20 seconds until the next request is allowed
    status, headers = asyncio.run(send_request(middleware, [], key))
    assert (status, headers["retry-after"]) == (429, "1")
    now[0] += 0.2
    assert asyncio.run(send_request(middleware, [], key))[0] == 200
    assert asyncio.run(send_request(middleware, [], key))[0] == 429
    now[0] += 3600  # not more than three are saved up
    statuses = [asyncio.run(send_request(middleware, [], key))[0] for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert asyncio.run(send_request(middleware, [], {}))[0] == 401  # which costs nothing


def test_tokens_a_minute(monkeypatch):
    from server.middleware import access

    now = [100.0]
    monkeypatch.setattr("server.access.monotonic", lambda: now[0])
    callers = make_access(tokens_per_minute=60)
    middleware = access.AccessMiddleware(reading_app, callers, max_body_bytes=100)
    key = {"Authorization": "Bearer key"}
    (caller,) = callers.callers.values()
    assert asyncio.run(send_request(middleware, [], key))[0] == 200
    caller.tokens.take(100)  # a request may end beyond the limit
    status, headers = asyncio.run(send_request(middleware, [], key))
    assert (status, headers["retry-after"]) == (429, "42")
    now[0] += 41.1
    assert asyncio.run(send_request(middleware, [], key))[0] == 200
    assert asyncio.run(send_request(middleware, [], key, method="GET"))[0] == 200


def test_requests_under_way():
    from server.middleware.access import AccessMiddleware

    async def run_together() -> list[int]:
        async def slow_app(scope, receive, send):
            await asyncio.sleep(0.2)
            await reading_app(scope, receive, send)

        middleware = AccessMiddleware(
            slow_app, make_access(concurrent_requests=2), max_body_bytes=100
        )
        key = {"Authorization": "Bearer key"}
        posts = await asyncio.gather(*(send_request(middleware, [], key) for _ in range(3)))
        gets = await asyncio.gather(
            *(send_request(middleware, [], key, method="GET") for _ in range(3))
        )
        return [status for status, _ in (*posts, *gets, await send_request(middleware, [], key))]

    assert asyncio.run(run_together()) == [200, 200, 429, 200, 200, 200, 200]


@pytest.mark.parametrize(
    ("method", "path", "root", "status"),
    [
        ("POST", "/v1/chat/completions", "", 200),
        ("POST", "/v1/load_lora_adapter", "", 403),
        ("POST", "/scale_elastic_ep", "", 403),
        ("POST", "/inference/v1/abort_requests", "", 403),
        ("POST", "/inference/v1/generate", "", 200),
        ("POST", "/a/route/of/a/later/version", "", 403),
        ("DELETE", "/proxies/aligned", "", 403),
        ("DELETE", "/proxies/aligned", "/p", 403),  # Starlette does not take "/p" away here either
        ("DELETE", "/p/proxies/aligned", "/p", 403),
        ("POST", "/p/v1/completions", "/p", 200),
        ("PUT", "/proxies", "", 403),
        ("GET", "/proxies", "", 200),
        ("DELETE", "/feedback", "", 200),
    ],
)
def test_what_a_user_may_send(method, path, root, status):
    from server.middleware.access import AccessMiddleware

    middleware = AccessMiddleware(reading_app, make_access(), max_body_bytes=100)
    key = {"Authorization": "Bearer key"}
    response = asyncio.run(
        send_request(middleware, [], key, method=method, path=path, root_path=root)
    )
    assert response[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Origin": "http://a.example"}, 401),
        ({"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}, 200),
    ],
)
def test_only_a_preflight_request_needs_no_key(headers, status):
    from server.middleware.access import AccessMiddleware

    middleware = AccessMiddleware(reading_app, make_access(), max_body_bytes=100)
    response = asyncio.run(send_request(middleware, [], headers, method="OPTIONS", path="/metrics"))
    assert response[0] == status


@pytest.mark.parametrize(
    ("host", "server", "status"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 200),
        ("localhost:8000", "127.0.0.1", 200),
        ("assent.localhost", "127.0.0.1", 200),
        ("[::1]:8000", "::1", 200),
        ("192.168.0.7:8000", "127.0.0.1", 200),  # no name, so no name server is involved
        ("evil.example:8000", "127.0.0.1", 421),
        ("evil.example", "::1", 421),
        ("localhost.evil.example", "127.0.0.1", 421),
        ("", "127.0.0.1", 200),  # no browser
        ("llm.example", "10.0.0.3", 200),
    ],
)
def test_without_keys_a_web_page_cannot_come_under_a_name_of_its_own(host, server, status):
    from server.access import read_access
    from server.middleware.access import AccessMiddleware

    middleware = AccessMiddleware(reading_app, read_access(None, [], {}), max_body_bytes=100)
    response = asyncio.run(send_request(middleware, [], {"Host": host}, server=(server, 8000)))
    assert response[0] == status
    middleware = AccessMiddleware(reading_app, make_access(), max_body_bytes=100)
    headers = {"Host": host, "Authorization": "Bearer key"}  # which the page does not have
    assert asyncio.run(send_request(middleware, [], headers, server=(server, 8000)))[0] == 200


def test_bodies_that_are_too_large():
    from server.middleware.access import AccessMiddleware

    middleware = AccessMiddleware(reading_app, make_access(), max_body_bytes=10)
    key = {"Authorization": "Bearer key"}
    assert asyncio.run(send_request(middleware, [b"12345", b"67890"], key))[0] == 200
    # Whatever the headers announce.
    assert asyncio.run(send_request(middleware, [b"12345", b"678901"], key))[0] == 413
    assert asyncio.run(send_request(middleware, [], key | {"Content-Length": "11"}))[0] == 413


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys.a]", "keys.a: .*needs either sha256 or env"),
        ("[keys.a]\nsha256 = 'abc'", "keys.a.sha256: "),
        ("[keys.a]\nenv = 'NOT_SET'", "the environment variable NOT_SET is not set"),
        ("[keys.a]\nenv = 'A'\nmax_sample = 3", "keys.a.max_sample: Extra inputs"),
        ("[default]\nrequests_per_minute = 0", "default.requests_per_minute: "),
        ("[keys.a]\nenv = 'A'\n[keys.b]\nenv = 'B'", "b and a are the same key"),
        ("[keys", "access.toml: "),
        (None, "access.toml: .*No such file"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    from server.access import AccessError, read_access

    file = tmp_path / "access.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(AccessError, match=message):
        read_access(file, [], {"A": "secret", "B": "secret"})


def test_where_keys_come_from(tmp_path):
    from starlette.datastructures import Headers

    from server.access import read_access

    file = tmp_path / "access.toml"
    file.write_text(
        "[default]\nmax_samples = 8\n[keys.alice]\nenv = 'ALICE'\nadmin = true\ntrace = false\n"
    )
    environment = {"ALICE": "a", "ASSENT_API_KEYS": "b, c", "ASSENT_ADMIN_KEYS": "d", "HOME": "/"}
    access = read_access(file, ["e"], environment)
    assert environment == {"HOME": "/"}  # no child process gets them
    callers_by_key = [access.find(Headers({"Authorization": f"Bearer {key}"})) for key in "abcde"]
    callers = [caller for caller in callers_by_key if caller is not None]
    assert [caller.name for caller in callers] == [
        *("alice", "ASSENT_API_KEYS 1", "ASSENT_API_KEYS 2", "ASSENT_ADMIN_KEYS 1", "--api-key 1")
    ]
    assert [caller.admin for caller in callers] == [True, False, False, True, False]
    assert all(caller.limits.max_samples == 8 for caller in callers)
    assert [caller.limits.trace for caller in callers] == [False, True, True, True, True]
    assert access.find(Headers({})) is None
    other_access = read_access(None, ["ключ"], {})  # a header's bytes are read as Latin-1
    headers = Headers(raw=[(b"authorization", "Bearer ключ".encode())])
    assert other_access.find(headers) is not None
    open_access = read_access(None, [], {})
    assert open_access.find(Headers({})) is open_access.anybody
    assert open_access.anybody.admin
