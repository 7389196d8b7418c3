"""The doctor's findings, without a start of the server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from proxy.checkpoint import load
from tests.hub import running
from tests.server.conftest import DEMO, REPOSITORY, free_port

MODEL = str(DEMO / "model")


@pytest.fixture(scope="module")
def findings():
    from server import arguments, doctor

    def find(*argv):
        by_subject = {}
        for level, subject, text in doctor.examine(arguments.parse(argv)):
            by_subject.setdefault(subject, []).append((level, text))
        return by_subject

    return find


def test_a_start_that_would_do(findings, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = f"--proxy=aligned={DEMO / 'proxies/aligned'}"
    flags = [proxy, f"--shadow=dark={DEMO / 'proxies/polite'}", "--port", str(port)]
    by_subject = findings("--model", MODEL, *flags, "--proxy-root", str(tmp_path))
    assert {level for entries in by_subject.values() for level, _ in entries} == {"ok"}
    assert "a shadow" in by_subject["proxy dark"][0][1]
    assert list(by_subject)[:5] == ["vLLM", "device", "flags", "port", "model"]
    assert "labels are the tokens" in by_subject["principle overall"][0][1]
    assert "of KV cache (65,568 tokens)" in by_subject["memory"][0][1]


def errors(by_subject):
    return {
        subject: text
        for subject, entries in by_subject.items()
        for level, text in entries
        if level != "ok"
    }


def test_all_that_is_wrong_at_once(findings, tmp_path, monkeypatch):
    weights = tmp_path / "proxy" / "proxy.safetensors"
    shutil.copytree(DEMO / "proxies" / "aligned", weights.parent)
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setenv("ASSENT_API_KEYS", "one one")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        by_subject = errors(
            findings(
                *("--model", MODEL, "--proxy", f"cut={weights.parent}", "--shadow", "x=/nowhere"),
                *("--port", str(bound.getsockname()[1]), "--pipeline-parallel-size", "2"),
                *("--proxy-root", "/nowhere", "--judge", str(tmp_path)),
                *("--kv-cache-memory-bytes", "900000G"),
            )
        )
    assert "--tensor-parallel-size" in by_subject["flags"]
    assert "take another with --port" in by_subject["port"]
    assert "proxy.safetensors" in by_subject["proxy cut"]
    assert "cannot be read" in by_subject["proxy x"]
    assert "no such directory" in by_subject["proxy root"]
    assert "no reward.json" in by_subject["judges"]
    assert "more than is free" in by_subject["memory"]
    assert "are the same key" in by_subject["keys"]


def test_judges_on_other_servers_are_asked_once(findings, tmp_path, monkeypatch):
    scores = iter([4.0, 1.0])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            text = json.dumps({"data": [{"probs": [next(scores)]}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_): ...

    text = 'kind = "{}"\nurl = "{}"\nmodel = "m"\nconcurrency = 1\n'.format
    reward, endpoint = tmp_path / "reward.toml", tmp_path / "endpoint.toml"
    endpoint.write_text(text("endpoint", f"http://127.0.0.1:{free_port()}"))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        reward.write_text(text("reward", f"http://127.0.0.1:{server.server_port}"))
        by_subject = findings("--model", MODEL, "--judge", str(reward), "--judge", str(endpoint))
        server.shutdown()
        thread.join()
    ((level, text),) = by_subject["judge reward"]
    assert level == "ok" and "prefers an answer to none with 95%" in text  # sigmoid(4 - 1)
    ((level, text),) = by_subject["judge endpoint"]
    assert level == "error" and "cannot be reached" in text and "http://127.0.0.1" in text
    reward.write_text(reward.read_text() + 'api_key_env = "NO_SUCH_KEY"\n')
    by_subject = errors(findings("--model", MODEL, "--judge", str(reward)))
    assert "NO_SUCH_KEY is not set" in by_subject["remote judges"]


def test_a_model_that_is_none(findings, tmp_path):
    by_subject = findings("--model", str(tmp_path))
    assert by_subject["model"][0][0] == "error" and list(by_subject)[-1] == "model"


def test_no_chat_template_and_no_keys(findings, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink(missing_ok=True)
    by_subject = errors(findings("--model", str(tmp_path / "model"), "--host", "0.0.0.0"))
    assert "--chat-template" in by_subject["chat template"]
    assert "anybody who reaches 0.0.0.0" in by_subject["keys"]
    assert "/judge will not work" in by_subject["principle overall"]


def test_its_exit_code_and_its_page(capsys):
    from server import doctor

    with pytest.raises(SystemExit) as exit_info:
        doctor.main(["--model", MODEL, "--pipeline-parallel-size", "2"])
    assert exit_info.value.code == 1
    printed = capsys.readouterr().out
    assert "error" in printed and "--tensor-parallel-size" in printed


@pytest.mark.slow  # half a minute of imports; tests/proxy/test_hub.py downloads too
def test_a_proxy_on_the_hub(tmp_path):
    """In a process of its own: `huggingface_hub` reads its environment when it is imported."""
    with running() as hub:
        hub.add("org/polite", DEMO / "proxies" / "polite")
        flags = ["--model", MODEL, "--proxy", "polite=org/polite@main", "--port", str(free_port())]
        result = subprocess.run(
            [sys.executable, "-m", "server", "doctor", *flags],
            env=os.environ | hub.environment(tmp_path), capture_output=True, text=True, cwd=REPOSITORY, check=False,
        )  # fmt: skip
    version = load(DEMO / "proxies" / "polite", base=None).version
    assert f"version {version}" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0
