"""Random and malformed requests: the answer is never a 5xx, and the engine survives."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx

from tests.server.conftest import ADMIN_KEY, WAIT_SECONDS

HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
TURN = [{"role": "user", "content": "How do I look after my freezer?"}]
CASES = 400
AT_ONCE = 32

NUMBERS = [0, 1, 2, 3, -1, 0.5, 1.0, 16, 17, 64, 65, 1024, 2**31, 2**63, 2**64, 1e308, -1e-320]
TEXTS = [
    *("", "aligned", "polite", "nobody", "assent-demo", "overall", "knock-out", "final-four"),
    *("../../etc/passwd", "aligned\x00", "ä\u202e🙂", "\ud800", "a" * 5000, "null", "1", "true"),
]
OTHER_VALUES = [None, True, False, [], {}, [[]], {"": {}}, ["aligned"], {"proxy": "aligned"}, "NaN"]
FIELDS = {
    "proxy": ["aligned", "polite", "nobody", "", None],
    "strength": [0, 0.5, 1, 16, 16.1, -1],
    "proxies": [
        {"aligned": 1, "polite": 0.5},
        {"polite": 0},
        {"polite": -1},
        {"": 1},
        {"nobody": 1},
        {},
    ],
    "max_rejections": [0, 1, 5, 1024, 1025, None],
    "trace": [True, False],
    "best_of": [1, 2, 3, 0, 65],
    "judge": None,
    "sample_timeout": [0.5, 10, 0, -1],
    "shadow": [True, False],
    "version": ["0", None],
    "unknown": [1],
}
JUDGE_FIELDS = {
    "principles": [["overall"], [], ["overall", "overall"], ["nobody"], None],
    "kind": ["pairwise", "likelihood", "probe", "proxy", "other"],
    "strategy": ["knock-out", "final-four", "round-robin", "other"],
    "seed": [0, 7, -1, 2**63],
    "proxies": [{"aligned": 1, "polite": 0.5}, {"polite": 1}, {}],
    "more": [1],
}
REQUEST_FIELDS = {
    "n": [1, 2, 3, 0, -1, "2"],
    "stream": [True, False],
    "seed": [1, -1, 2**63, "x"],
    "temperature": [0, 1, 2, -1],
    "top_k": [1, 16, -1, 0],
    "max_tokens": [1, 2, 0],
    "logprobs": [True],
    "top_logprobs": [1, 20],
    "stop": ["a", ["a", "b"]],
    "use_beam_search": [True],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "model": [
        "assent-demo",
        "assent-demo:aligned",
        "assent-demo:",
        "assent-demo:aligned+polite",
        "assent-demo:+",
        ":aligned",
        "a:b:c",
        3,
    ],
    "vllm_xargs": [{"alignment": {}}, {"a": 1}, 3],
}


def random_value(rng, depth=0):
    """A value of any type; objects and lists a few levels deep, now and then very deep."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 8 or depth > 3:
        return rng.choice(OTHER_VALUES)
    if kind == 8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_fields(rng, fields):
    """Some of the fields, with values that fit, nearly fit, or are anything."""
    result = {}
    for name in rng.sample(list(fields), rng.randint(0, 3)):
        values = fields[name]
        if rng.random() < 0.3 or values is None:
            result[name] = (
                random_fields(rng, JUDGE_FIELDS) if name == "judge" else random_value(rng)
            )
        else:
            result[name] = rng.choice(values)
    return result


def body_of(rng):
    alignment = random_fields(rng, FIELDS) if rng.random() < 0.9 else random_value(rng)
    body = {"model": "assent-demo", "messages": TURN, "max_tokens": 2, "alignment": alignment}
    if rng.random() < 0.4:
        body |= random_fields(rng, REQUEST_FIELDS)
    text = json.dumps(body)
    if rng.random() < 0.02:  # cut, or doubled somewhere
        position = rng.randrange(len(text))
        text = text[:position] + (text[position - 1 :] if rng.random() < 0.5 else "")
    if rng.random() < 0.01:
        text = text.replace('"alignment": ', '"alignment": ' + "[" * 3000, 1)
    return text.encode()


def test_alignment_fields(server, http):
    rng = random.Random(0)
    bodies = [body_of(rng) for _ in range(CASES)]

    async def send_all():
        pending, statuses, failures = list(enumerate(bodies)), Counter(), []
        async with httpx.AsyncClient(
            base_url=server.url, headers=HEADERS, timeout=WAIT_SECONDS
        ) as client:

            async def worker():
                while pending:
                    _, body = pending.pop()
                    answer = await client.post("/v1/chat/completions", content=body)
                    statuses[answer.status_code] += 1
                    if answer.status_code >= 500:
                        failures.append((answer.text[:300], body[:600]))

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        return statuses, failures

    expected = known_good(http)
    statuses, failures = asyncio.run(send_all())
    assert failures == []
    assert sum(statuses.values()) == CASES
    assert set(statuses) == {200, 400, 404}
    assert min(statuses[200], statuses[400]) > CASES / 10  # it reaches behind the validation, too
    assert http.get("/health").status_code == 200
    assert known_good(http) == expected
    # No request still holds a proxy.
    assert {proxy["in_flight"] for proxy in http.get("/proxies").json()["data"]} == {0}


def known_good(http):
    body = {"model": "assent-demo:aligned", "messages": TURN, "seed": 5, "max_tokens": 12}
    return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]


OUR_ROUTES = "^/(judge|proxies|positions|ready|feedback|v1/(chat/completions|completions|models))"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_route_of_ours(server, http, tmp_path):
    """Requests that fit its OpenAPI schema, and some that nearly do. Every response fits it too."""
    program = Path(sys.executable).with_name("st")
    command = [program, "run", f"{server.url}/openapi.json", "--include-path-regex", OUR_ROUTES]
    command += ["--checks", CHECKS, "--phases", "examples,fuzzing", "--seed", "1"]
    # A busy machine may be slow at both.
    command += ["--request-timeout", str(WAIT_SECONDS), "--suppress-health-check", "too_slow"]
    command += ["--max-examples", "10", "-H", f"Authorization: Bearer {ADMIN_KEY}"]
    proxies_before = http.get("/proxies").json()["data"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    cases = re.search(r"(\d+) generated, (\d+) passed", result.stdout)
    assert cases is not None and cases[1] == cases[2] and int(cases[1]) > 100
    assert http.get("/proxies").json()["data"] == proxies_before
    assert known_good(http)["content"]
