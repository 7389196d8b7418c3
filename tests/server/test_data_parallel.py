"""Two data-parallel engines behind one server: a proxy is on both or on none, and each has counts of its own."""

import json
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.conftest import WAIT_SECONDS, proxy_flags, serving

REQUESTS = 16
MINE = {"model": "assent-demo", "alignment": {"proxy": "mine"}}
QUESTION = [{"role": "user", "content": "How do I look after my freezer?"}]


@pytest.fixture(scope="module")
def root(proxy_root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("root")
    shutil.copytree(proxy_root / "v2", directory / "v2")
    shutil.copytree(proxy_root / "v3", directory / "poison")
    return directory


@pytest.fixture(scope="module")
def two_engines(root, tmp_path_factory):
    flags = ["--data-parallel-size", "2", "--proxy-root", root, *proxy_flags()]
    # Kernels of bfloat16 round differently in another batch.
    flags += ["--dtype", "float32", "--worker-cls", "tests.server.faulty_worker.FaultyWorker"]
    log = tmp_path_factory.mktemp("two") / "log"
    with (
        serving(log, *flags, environment={"TESTS_LOADED": str(root)}) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_SECONDS) as client,
    ):
        yield client


def ask_all(client, fields_of, **options):
    """Send REQUESTS requests at once. vLLM gives half of them to each engine."""

    def send(number):
        body = {
            "model": "assent-demo:aligned",
            "messages": QUESTION,
            "seed": number % 4,
            "max_tokens": 40,
        }
        answer = client.post("/v1/chat/completions", json=body | options | fields_of(number))
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(send, range(REQUESTS)))


def finished_requests(client):
    """Requests that each engine has finished, and all tokens under a proxy."""
    text, tokens = client.get("/metrics").text, 0.0
    engines: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.match(r'vllm:request_success_total\{engine="(\d)".* (\S+)$', line):
            engines[match[1]] += int(float(match[2]))
        if match := re.match(r'assent_tokens_aligned_total\{proxy="aligned".* (\S+)$', line):
            tokens += float(match[1])
    return engines, tokens


def test_both_speak_and_both_are_counted(two_engines):
    engines, tokens = finished_requests(two_engines)
    answers = ask_all(two_engines, lambda number: {"alignment": {"trace": number < 8}})
    engines_after, tokens_after = finished_requests(two_engines)
    assert min((engines_after - engines)[engine] for engine in "01") >= REQUESTS // 4
    emitted = [answer["usage"]["completion_tokens"] for answer in answers]
    alignments = [answer["alignment"] for answer in answers]
    assert [alignment["accepted"] + alignment["forced"] for alignment in alignments] == emitted
    assert [len(alignment["trace"][0]) for alignment in alignments[:8]] == emitted[:8]
    assert tokens_after - tokens == sum(emitted)
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert len(set(texts)) == 4 and texts == texts[:4] * 4  # of any engine


def test_samples_without_a_seed_differ(two_engines):
    """Engines that began with one state of the generator would give equal texts.

    Two tokens are equal with a probability of 0.55 (geometric mean, frozen LLM, 16 candidates), and so any of 120 pairs
    of 80 tokens below 1e-6.
    """
    options = {"temperature": 2.0, "top_k": -1, "top_p": 1.0, "ignore_eos": True, "max_tokens": 80}
    answers = ask_all(two_engines, lambda number: {"seed": None}, **options)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == REQUESTS


def test_best_of_several_engines(two_engines):
    body = {
        "model": "assent-demo:aligned",
        "messages": QUESTION,
        "seed": 1,
        "alignment": {"best_of": 4},
    }
    answer = two_engines.post("/v1/chat/completions", json=body).json()
    usage, alignment = answer["usage"], answer["alignment"]
    assert len(alignment["judge"]["ranking"]) == 4
    judge_tokens = alignment["judge"]["usage"]["completion_tokens"]
    assert alignment["accepted"] + alignment["forced"] == usage["completion_tokens"] - judge_tokens


def test_a_load_reaches_every_engine(two_engines):
    version = two_engines.post("/proxies", json={"name": "mine", "path": "v2"}).json()["version"]
    for answer in ask_all(two_engines, lambda number: MINE):
        assert (answer["alignment"]["version"], answer["alignment"]["proposed"] > 0) == (
            version,
            True,
        )
    assert two_engines.delete("/proxies/mine").status_code == 200


def test_a_load_that_one_engine_cannot_do_is_undone_on_the_other(two_engines, root):
    version = two_engines.post("/proxies", json={"name": "mine", "path": "v2"}).json()["version"]
    response = two_engines.post("/proxies", json={"name": "mine", "path": "poison"})
    assert response.status_code == 400 and "no room on the second engine" in response.text
    for answer in ask_all(two_engines, lambda number: MINE):
        assert answer["alignment"]["version"] == version
    engine_proxies = [json.loads((root / engine).read_text()) for engine in "01"]
    assert engine_proxies[0] == engine_proxies[1]
    assert [entry for entry in engine_proxies[0] if entry[0] == "mine"] == [["mine", version]]
