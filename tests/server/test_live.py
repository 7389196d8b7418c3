"""Proxies loaded, replaced and unloaded while the server serves."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest

from proxy.checkpoint import load
from tests.server.conftest import wait_until
from tests.server.test_bad_requests import assert_refused

QUESTION = [{"role": "user", "content": "How do I look after my freezer?"}]


@pytest.fixture
def live_http(http):
    """Unloads after a test the proxies that it has loaded."""
    names_before = proxy_names(http)
    yield http
    for proxy in http.get("/proxies").json()["data"]:
        if proxy["name"] not in names_before and proxy["state"] != "draining":
            assert http.delete(f"/proxies/{proxy['name']}").status_code in (200, 202)
    wait_until(lambda: proxy_names(http) == names_before)


def proxy_names(http):
    return {proxy["name"] for proxy in http.get("/proxies").json()["data"]}


def load_as(http, name, path, **fields):
    return http.post("/proxies", json={"name": name, "path": path} | fields)


def states(http, name):
    """[(version, state, in flight), ...] of every loaded version."""
    return [
        (proxy["version"], proxy["state"], proxy["in_flight"])
        for proxy in http.get("/proxies").json()["data"]
        if proxy["name"] == name
    ]


def long_chat(model="assent-demo:live", **fields):
    return {
        "model": model,
        "messages": QUESTION,
        "seed": 3,
        "max_tokens": 800,
        "ignore_eos": True,
        "alignment": {},
    } | fields


def complete(http, model="assent-demo:live", **fields):
    answer = http.post("/v1/chat/completions", json=long_chat(model, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


class Stream:
    """A long streamed answer whose first chunks have arrived."""

    def __init__(self, http, **fields):
        self.context = http.stream(
            "POST", "/v1/chat/completions", json=long_chat(stream=True, **fields)
        )
        self.answer = self.context.__enter__()
        self.events = (
            json.loads(line.removeprefix("data: "))
            for line in self.answer.iter_lines()
            if line.startswith("data: {")
        )
        self.chunks = [next(self.events) for _ in range(3)]

    def close(self):
        self.context.__exit__(None, None, None)

    def finish(self):
        """The whole text and the alignment object."""
        self.chunks += self.events
        self.close()
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in self.chunks)
        return text, self.chunks[-1]["alignment"]


def test_load_use_unload(live_http, client, proxy_root):
    answer = load_as(live_http, "live", "v2")
    assert answer.status_code == 201
    entry = answer.json()
    version = load(proxy_root / "v2", base=None).version
    assert (entry["name"], entry["version"]) == ("live", version)
    assert (entry["state"], entry["in_flight"]) == ("serving", 0)
    assert entry["directory"] == str(proxy_root / "v2")
    assert entry["num_bytes"] > 4 * entry["num_parameters"] > 0
    assert entry["training"]
    assert entry.pop("remembered") is True
    assert entry in live_http.get("/proxies").json()["data"]
    assert "assent-demo:live" in {model.id for model in client.models.list().data}

    chat_response = live_http.post("/v1/chat/completions", json=long_chat(max_tokens=8))
    assert chat_response.headers["assent-proxy"] == f"live@{version}"
    assert chat_response.json()["alignment"]["version"] == version

    unload_response = live_http.delete("/proxies/live")
    assert (unload_response.status_code, unload_response.json()["state"]) == (200, "unloaded")
    assert_refused(
        live_http.post("/v1/chat/completions", json=long_chat()), 404, "'live'", "aligned, polite"
    )
    assert_refused(live_http.delete("/proxies/live"), 404, "'live'")
    assert "assent-demo:live" not in {model.id for model in client.models.list().data}


def test_the_same_content_again_changes_nothing(live_http):
    assert load_as(live_http, "live", "v1").status_code == 201
    proxies_before = live_http.get("/proxies").json()
    for path in ("v1", "link-in", "./v1"):
        assert load_as(live_http, "live", path).status_code == 200
    assert live_http.get("/proxies").json() == proxies_before


def assert_interleaved(attempt):
    """`attempt` returns whether its stream was still running when it made its change.

    If not, the machine was busy with something else, and it is tried again.
    """
    assert any(attempt() for _ in range(5))


def test_a_stream_keeps_the_version_it_began_with(live_http):
    """A version that is replaced meanwhile finishes its answer as on a quiet server."""
    v1 = load_as(live_http, "live", "v1").json()["version"]
    quiet_v1 = text_of(complete(live_http))
    v2 = load_as(live_http, "live", "v2").json()["version"]
    quiet_v2 = text_of(complete(live_http))
    assert quiet_v1 != quiet_v2
    assert states(live_http, "live") == [(v2, "serving", 0)]

    def replace_under_way():
        load_as(live_http, "live", "v1")
        stream = Stream(live_http)
        assert stream.answer.headers["assent-proxy"] == f"live@{v1}"
        assert load_as(live_http, "live", "v2").status_code == 201
        found_states = states(live_http, "live")
        text, alignment = stream.finish()
        assert (text, alignment["version"]) == (quiet_v1, v1)
        assert alignment["accepted"] + alignment["forced"] == 800
        return found_states == [(v1, "draining", 1), (v2, "serving", 0)]

    assert_interleaved(replace_under_way)
    wait_until(lambda: states(live_http, "live") == [(v2, "serving", 0)])
    assert text_of(complete(live_http)) == quiet_v2


def test_a_stream_survives_the_unloading_of_its_proxy(live_http):
    v1 = load_as(live_http, "live", "v1").json()["version"]
    expected = text_of(complete(live_http))

    def unload_under_way():
        load_as(live_http, "live", "v1")
        stream = Stream(live_http)
        response = live_http.delete("/proxies/live")
        assert_refused(live_http.post("/v1/chat/completions", json=long_chat()), 404, "'live'")
        text, alignment = stream.finish()
        assert (text, alignment["version"]) == (expected, v1)
        body = response.json()
        return (response.status_code, body["state"], body["in_flight"]) == (202, "draining", 1)

    assert_interleaved(unload_under_way)
    wait_until(lambda: states(live_http, "live") == [])


def test_new_requests_get_the_new_version_at_once(live_http):
    v1 = load_as(live_http, "live", "v1").json()["version"]

    def ask_under_way():
        load_as(live_http, "live", "v1")
        stream = Stream(live_http, n=8)
        v2 = load_as(live_http, "live", "v2").json()["version"]
        assert complete(live_http, max_tokens=4)["alignment"]["version"] == v2
        found_states = states(live_http, "live")
        stream.close()
        return found_states == [(v1, "draining", 1), (v2, "serving", 0)]

    assert_interleaved(ask_under_way)


def test_a_rollback_takes_back_what_still_drains(live_http):
    v1 = load_as(live_http, "live", "v1").json()["version"]

    def roll_back_under_way():
        load_as(live_http, "live", "v1")
        stream = Stream(live_http, n=8)
        load_as(live_http, "live", "v2")
        response = load_as(live_http, "live", "v1")
        found_states = states(live_http, "live")
        stream.close()
        assert response.json()["version"] == v1
        return response.status_code == 200 and found_states == [(v1, "serving", 1)]

    assert_interleaved(roll_back_under_way)
    wait_until(lambda: states(live_http, "live") == [(v1, "serving", 0)])


def test_best_of_keeps_its_version_too(live_http):
    v1 = load_as(live_http, "live", "v1").json()["version"]
    options = {"max_tokens": 200, "alignment": {"best_of": 8, "judge": {"seed": 1}}}

    def replace_under_way():
        load_as(live_http, "live", "v1")
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(complete, live_http, **options)
            wait_until(lambda: states(live_http, "live") == [(v1, "serving", 1)] or future.done())
            v2 = load_as(live_http, "live", "v2").json()["version"]
            found_states = states(live_http, "live")
            alignment = future.result()["alignment"]
        assert alignment["version"] == v1
        assert alignment["accepted"] + alignment["forced"] == 8 * 200
        return found_states == [(v1, "draining", 1), (v2, "serving", 0)]

    assert_interleaved(replace_under_way)
    wait_until(lambda: len(states(live_http, "live")) == 1)


def test_a_client_that_goes_away_frees_the_version(live_http):
    load_as(live_http, "live", "v1")
    Stream(live_http).close()
    wait_until(lambda: [in_flight for *_, in_flight in states(live_http, "live")] == [0])
    stream = Stream(live_http, n=8)
    live_http.delete("/proxies/live")
    stream.close()
    wait_until(lambda: states(live_http, "live") == [])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        ({"messages": "Hi."}, 400),
        ({"temperature": -1}, 400),
        ({"alignment": {"best_of": 2}, "n": 3}, 400),
        ({"alignment": {"proxy": "polite"}}, 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_holds_nothing(live_http, change, code, stream):
    load_as(live_http, "live", "v1")
    answer = live_http.post("/v1/chat/completions", json=long_chat(stream=stream) | change)
    assert answer.status_code == code
    assert [in_flight for *_, in_flight in states(live_http, "live")] == [0]


def test_loads_at_the_same_time_go_one_after_another(live_http):
    paths = ["v1", "v2", "v3"] * 4
    with ThreadPoolExecutor(len(paths)) as pool:
        codes = [
            answer.status_code
            for answer in pool.map(lambda path: load_as(live_http, "live", path), paths)
        ]
    assert set(codes) <= {200, 201}
    (remaining,) = states(live_http, "live")
    assert remaining[1:] == ("serving", 0)
    assert complete(live_http, max_tokens=4)["alignment"]["version"] == remaining[0]


def test_traffic_while_versions_change(live_http):
    """Every answer comes from the version that it names, as its first accept logit shows.

    The versions' accept logits for the same candidate are 2 and 3 below the first one's.
    """

    def first_accept_logit(answer):
        entry = answer["alignment"]["trace"][0][0]
        p = entry["accept_probability"]
        return entry["token_id"], math.log(p / (1 - p))

    options = {
        "max_tokens": 30,
        "temperature": 0,
        "alignment": {"trace": True, "max_rejections": 9},
    }
    expected_logits = {}
    for path in ("v1", "v2", "v3"):
        version = load_as(live_http, "live", path).json()["version"]
        expected_logits[version] = first_accept_logit(complete(live_http, **options))
    assert len(expected_logits) == 3

    answers = []
    all_loaded = Event()

    def send_requests():
        while not all_loaded.is_set():
            answers.append(complete(live_http, **options))

    def num_answers(version):
        return sum(answer["alignment"]["version"] == version for answer in answers)

    def has_answered(version, times):
        return num_answers(version) >= times

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(send_requests) for _ in range(8)]
        try:
            for path in ["v1", "v2", "v3"] * 3:
                version = load_as(live_http, "live", path).json()["version"]
                num_before = num_answers(version)
                wait_until(partial(has_answered, version, num_before + 3))
        finally:
            all_loaded.set()
        for future in futures:
            future.result()
    for answer in answers:
        expected, logit = expected_logits[answer["alignment"]["version"]]
        token_id, found_logit = first_accept_logit(answer)
        assert token_id == expected
        assert found_logit == pytest.approx(logit, abs=0.3)
    wait_until(lambda: len(states(live_http, "live")) == 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc", "is absolute"),
        ("../outside", "'..'"),
        ("v1/../v1", "'..'"),
        ("nowhere", "does not exist"),
        ("file", "is not a directory"),
        ("link-out", "symbolic link"),
        ("linked-file", "symbolic link"),
        ("loop", "does not exist"),
        ("v1\0", "does not exist"),
        ("v" * 5000, "does not exist"),
        ("empty", "config.json cannot be read"),
        ("pickled", "proxy.safetensors cannot be read"),
        ("corrupt", "is corrupt"),
        ("other-llm", "0" * 64),
        ("other-sizes", "hidden size 64"),
    ],
)
def test_what_cannot_be_loaded(live_http, path, message):
    load_as(live_http, "live", "v1")
    proxies_before = live_http.get("/proxies").json()
    assert_refused(load_as(live_http, "live", path), 400, message)
    assert live_http.get("/proxies").json() == proxies_before
    assert complete(live_http, max_tokens=4)["alignment"]["proxy"] == "live"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a/b", "path": "v1"},
        {"name": "", "path": "v1"},
        {"name": "a:b", "path": "v1"},
        {"name": "a\n", "path": "v1"},
        {"name": "live"},
        {"path": "v1"},
        {"name": "live", "path": "v1", "shadw": True},
        {"name": "live", "path": 3},
        {"name": "live", "path": "v1", "shadow": "perhaps"},
    ],
)
def test_malformed_loads(live_http, body):
    assert_refused(live_http.post("/proxies", json=body), 400)


def test_unloading_what_is_not_there(live_http):
    load_as(live_http, "live", "v1")
    assert_refused(live_http.delete("/proxies/nobody"), 404, "'nobody'", "live")
    assert_refused(
        live_http.delete("/proxies/live", params={"version": "0"}), 404, "'live' of version '0'"
    )
    version = states(live_http, "live")[0][0]
    assert live_http.delete("/proxies/live", params={"version": version}).status_code == 200


# --- shadows ---


def shadow_counts(http):
    """{version: (scored, changed)}"""
    counts = {}
    for line in http.get("/metrics").text.splitlines():
        for column, name in enumerate(("tokens", "changed")):
            if line.startswith(f"assent_shadow_{name}_total{{"):
                labels, value = line.split("{")[1].split("} ")
                version = labels.split('version="')[1].split('"')[0]
                counts.setdefault(version, [0.0, 0.0])[column] = float(value)
    return counts


def test_a_shadow_scores_and_does_not_act(live_http, client):
    aligned_text = text_of(complete(live_http, "assent-demo:aligned", max_tokens=64))
    unproxied_text = text_of(complete(live_http, "assent-demo", max_tokens=64))
    answer = load_as(live_http, "dark", "v3", shadow=True)
    assert (answer.status_code, answer.json()["state"]) == (201, "shadow")
    version = answer.json()["version"]
    scored_before, _ = shadow_counts(live_http).get(version, (0.0, 0.0))
    assert text_of(complete(live_http, "assent-demo:aligned", max_tokens=64)) == aligned_text
    assert text_of(complete(live_http, "assent-demo", max_tokens=64)) == unproxied_text
    response = live_http.post(
        "/judge", json={"prompt": "Hi.", "response_a": "a", "response_b": "b"}
    )
    assert response.status_code == 200
    time.sleep(1.1)  # the worker updates its counters once a second
    complete(live_http, "assent-demo", max_tokens=1)
    wait_until(lambda: shadow_counts(live_http).get(version, (0.0, 0.0))[0] - scored_before >= 128)
    scored, changed = shadow_counts(live_http)[version]
    assert scored - scored_before <= 130  # the judge's tokens are not among them
    assert 0 < changed <= scored

    assert "assent-demo:dark" not in {model.id for model in client.models.list().data}
    for body in (
        long_chat("assent-demo:dark"),
        long_chat("assent-demo", alignment={"proxy": "dark"}),
    ):
        assert_refused(live_http.post("/v1/chat/completions", json=body), 400, "'dark' is a shadow")
    assert_refused(load_as(live_http, "dark", "v1"), 409, "unload it first")
    assert_refused(load_as(live_http, "aligned", "v1", shadow=True), 409, "unload it first")
    assert live_http.delete("/proxies/dark").json()["state"] == "unloaded"
