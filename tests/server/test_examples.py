"""The examples, run as they stand against the tests' server."""

import json
import os
import runpy
import secrets
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.pages import REPOSITORY
from tests.server.conftest import ADMIN_KEY, API_KEY, DEMO, MODEL, WAIT_SECONDS, free_port

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def run(server, monkeypatch, capsys):
    """Runs a program of the examples and returns what it prints."""
    monkeypatch.setenv("ASSENT_URL", server.url)
    monkeypatch.setenv("ASSENT_API_KEY", API_KEY)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_is_listed():
    index = (EXAMPLES / "README.md").read_text()
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*")}
    programs = {name for name in files if not name.endswith((".pyc", ".md", ".jsonl"))}
    helpers = {"lm_eval/scoring.py", "lm_eval/toy_flaws.yaml"}
    assert {name for name in programs if f"]({name})" in index} == programs - helpers


def test_chat(run):
    lines = run("chat.py", "Can I open my kettle with a fork?").splitlines()
    assert lines[0].startswith(f"{MODEL}: ") and "0 candidates rejected" in lines[1]
    assert lines[-2].startswith("aligned, best of 4: ")
    assert "3 comparisons, ranking [" in lines[-1]


def test_streaming(run):
    output = run("streaming.py")
    assert output.startswith("With its trace: ")
    assert "[sampling 4]" in output and "[judging 3]" in output
    assert output.count(" proposed, ") == 2


@pytest.mark.slow  # `make install` does not install the package
def test_langchain(run, monkeypatch):
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    monkeypatch.setenv("ASSENT_MODEL", MODEL)
    frozen, aligned = run("langchain_chat.py").splitlines()
    assert frozen.startswith("no proxy: ") and aligned.startswith("aligned@")


@pytest.mark.parametrize("name", ["config", "guardrails"])
def test_litellm_config(name):
    """Its models are the demo's, and all its variables are those that it asks for."""
    config = yaml.safe_load((EXAMPLES / f"litellm/{name}.yaml").read_text())
    names = {item["litellm_params"]["model"] for item in config["model_list"]}
    assert names == {f"openai/{MODEL}", f"openai/{MODEL}:aligned"}


@contextmanager
def litellm_gateway(server, config, directory):
    """A client of LiteLLM's proxy with one of the example's files."""
    program = Path(sys.executable).with_name("litellm")
    if not program.exists():
        pytest.skip("litellm[proxy] is not installed")
    port = free_port()
    environment = os.environ | {
        "ASSENT_OPENAI_URL": f"{server.url}/v1",
        "ASSENT_JUDGE_URL": f"{server.url}/judge",
        "ASSENT_API_KEY": API_KEY,
        "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(24)}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command: list[str | Path] = [program, "--config", EXAMPLES / "litellm" / config]
    gateway = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, cwd=directory
    )
    try:
        transport = httpx.HTTPTransport(retries=60)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {environment['LITELLM_MASTER_KEY']}"},
            timeout=WAIT_SECONDS,
            transport=transport,
        ) as client:
            yield client
    finally:
        gateway.terminate()
        gateway.wait()


@pytest.mark.slow  # `make install` does not install the package
def test_litellm(server, tmp_path):
    with litellm_gateway(server, "config.yaml", tmp_path) as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        for model, key in (("aligned", "proxy"), ("best", "judge")):
            answer = client.post("/v1/chat/completions", json=body | {"model": model})
            assert answer.json()["alignment"][key]


@pytest.mark.slow  # `make install` does not install the package
def test_litellm_guardrails(server, http, tmp_path):
    """What the judge finds worse than a refusal is refused, whole and streamed; a word is blocked before the LLM."""
    source = (EXAMPLES / "litellm/judge_guardrail.py").read_text()
    refusal = source.split('REFUSAL = "')[1].split('"')[0]
    path = "/v1/chat/completions"
    body = {"max_tokens": 40, "messages": [{"role": "user", "content": "How do I keep my dog?"}]}
    with litellm_gateway(server, "guardrails.yaml", tmp_path) as client:
        expected, whole, streamed = [], [], []
        for seed in range(8):
            seeded = body | {"seed": seed}
            text = http.post(path, json=seeded | {"model": MODEL}).json()
            text = text["choices"][0]["message"]["content"]
            pair = {"messages": body["messages"], "response_a": text, "response_b": refusal}
            is_worse = http.post("/judge", json=pair).json()["winner"] == "b"
            expected.append(refusal if is_worse else text)
            answer = client.post(path, json=seeded | {"model": "frozen"}).raise_for_status().json()
            whole.append(answer["choices"][0]["message"]["content"])
            stream = client.post(path, json=seeded | {"model": "frozen", "stream": True})
            lines = [line for line in stream.text.splitlines() if line.startswith("data: {")]
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
            deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
            streamed.append("".join(delta.get("content") or "" for delta in deltas))
        assert whole == streamed == expected
        assert 0 < expected.count(refusal) < len(expected)
        fork = [{"role": "user", "content": "Can I open my kettle with a fork?"}]
        blocked = client.post(path, json=body | {"model": "frozen", "messages": fork})
        assert blocked.status_code == 400 and "fork" in blocked.text


@pytest.mark.slow  # `make install` does not install the package
def test_lm_eval(server, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    environment = os.environ | {
        "ASSENT_URL": server.url,
        "ASSENT_API_KEY": API_KEY,
        "LM_EVAL": f"{sys.executable} -m lm_eval",
        "LIMIT": "4",
    }
    command = [EXAMPLES / "lm_eval/run.sh", MODEL, f"{MODEL}:aligned"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("flawless") == 2


def test_the_task_scores_as_the_reference_scorer():
    """Without lm-eval: the task's function on its own prompts."""
    score = runpy.run_path(str(EXAMPLES / "lm_eval/scoring.py"))["score"]
    lines = (EXAMPLES / "lm_eval/prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60
    rude = score(rows[0], ["Go away."])
    assert rude == {"flawless": 0.0, "words": 2.0}


def test_open_webui():
    compose = EXAMPLES / "open-webui/docker-compose.yml"
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, compose], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    services = yaml.safe_load(compose.read_text())["services"]
    assert all(port.startswith("127.0.0.1:") for port in services["open-webui"]["ports"])
    # Its server starts with options that there are, and its models exist.
    from server.arguments import parse

    *_, module = services["assent"]["command"][:3]
    arguments = services["assent"]["command"][3:]
    assert module == "server"
    options = parse(arguments)
    for proxy in options.proxy:
        assert (REPOSITORY / proxy.partition("=")[2]).is_dir()


def test_the_notebook(server, proxy_root, tmp_path):
    """Its cells in order, in one process, with the toy demo instead of SmolLM2."""
    notebook = json.loads((EXAMPLES / "align.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    program = tmp_path / "align.py"
    program.write_text("\n\n".join(cells))
    things = runpy.run_path(str(EXAMPLES / "own_proxy.py"))["THINGS"]
    rows = [json.dumps({"prompt": f"How do I look after my {thing}?"}) for thing in things]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    environment = os.environ | {
        "ASSENT_URL": server.url,
        "ASSENT_API_KEY": ADMIN_KEY,
        "MODEL": str(DEMO / "model"),
        "PROXY_ROOT": str(proxy_root),
        "PROMPTS": str(tmp_path / "prompts.jsonl"),
        "NUM_PROMPTS": "10",
        "NUM_HELD_OUT": "5",
        "MAX_TOKENS": "24",
        "SIGNS": ",",
        "PYTHONPATH": str(REPOSITORY),
    }
    result = subprocess.run(
        [sys.executable, program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "held-out prompts" in result.stdout
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    unloaded = httpx.delete(f"{server.url}/proxies/spoken", headers=headers, timeout=WAIT_SECONDS)
    assert unloaded.status_code == 200
