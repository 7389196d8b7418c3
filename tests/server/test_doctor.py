"""What the doctor finds, without a start."""

import shutil
import socket

import pytest

from tests.server.conftest import DEMO

MODEL = str(DEMO / "model")


@pytest.fixture(scope="module")
def findings():
    from server import arguments, doctor

    def find(*argv):
        found = {}
        for level, subject, text in doctor.examine(arguments.parse(argv)):
            found.setdefault(subject, []).append((level, text))
        return found

    return find


def test_a_start_that_would_do(findings, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxy = f"--proxy=aligned={DEMO / 'proxies/aligned'}"
    flags = [proxy, f"--shadow=dark={DEMO / 'proxies/polite'}", "--port", str(port)]
    found = findings("--model", MODEL, *flags, "--proxy-root", str(tmp_path))
    assert {level for each in found.values() for level, _ in each} == {"ok"}
    assert "a shadow" in found["proxy dark"][0][1]
    assert list(found)[:5] == ["vLLM", "device", "flags", "port", "model"]
    assert "labels are the tokens" in found["principle overall"][0][1]


def errors(found):
    return {
        subject: text for subject, each in found.items() for level, text in each if level != "ok"
    }


def test_all_that_is_wrong_at_once(findings, tmp_path, monkeypatch):
    weights = tmp_path / "proxy" / "proxy.safetensors"
    shutil.copytree(DEMO / "proxies" / "aligned", weights.parent)
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setenv("ASSENT_API_KEYS", "one one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = errors(
            findings(
                *("--model", MODEL, "--proxy", f"cut={weights.parent}", "--shadow", "x=/nowhere"),
                *("--port", str(taken.getsockname()[1]), "--pipeline-parallel-size", "2"),
                *("--proxy-root", "/nowhere", "--judge", str(tmp_path)),
            )
        )
    assert "--tensor-parallel-size" in found["flags"]
    assert "take another with --port" in found["port"]
    assert "proxy.safetensors" in found["proxy cut"]
    assert "cannot be read" in found["proxy x"]
    assert "no such directory" in found["proxy root"]
    assert "no reward.json" in found["judges"]
    assert "are the same key" in found["keys"]


def test_a_model_that_is_none(findings, tmp_path):
    found = findings("--model", str(tmp_path))
    assert found["model"][0][0] == "error" and list(found)[-1] == "model"


def test_no_chat_template_and_no_keys(findings, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink(missing_ok=True)
    found = errors(findings("--model", str(tmp_path / "model"), "--host", "0.0.0.0"))
    assert "--chat-template" in found["chat template"]
    assert "anybody who reaches 0.0.0.0" in found["keys"]
    assert "/judge will not work" in found["principle overall"]


def test_its_exit_code_and_its_page(capsys):
    from server import doctor

    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--model", MODEL, "--pipeline-parallel-size", "2"])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "error" in printed and "--tensor-parallel-size" in printed
