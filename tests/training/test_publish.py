"""`--push-to-hub`, and what is there then, on a Hub of this machine with the real `huggingface_hub`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from proxy.checkpoint import load
from tests.hub import TOKEN, Hub, running
from tests.training.models import data_rows, save_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy/demo"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


def run(hub: Hub, cache: Path, *arguments: str | Path, token: str | None = TOKEN):
    """In a process of its own: `huggingface_hub` reads its environment when it is imported."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=variables | hub.environment(cache, token=token),
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def rows_of(kind: str, directory: Path) -> Path:
    """A file of rows of this kind of data."""
    path = directory / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data_rows(kind)))
    return path


def test_a_proxy_is_uploaded(hub: Hub, tmp_path: Path) -> None:
    model, output, cache = tmp_path / "model", tmp_path / "mine", tmp_path / "cache"
    save_model("llama", model)
    arguments = [
        "training.proxy_dpo", "--model", model, "--preferences", rows_of("preferences", tmp_path), "--epochs", "1",
        "--output", output, "--push-to-hub", "org/mine",
    ]  # fmt: skip

    hub.refuses_uploads = True
    result = run(hub, cache, *arguments)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert "the upload failed (" in line and f"`hf upload org/mine {output} . --include" in line
    (output / "notes.json").write_text("{}")  # not the run's: it stays here
    hub.refuses_uploads = False

    result = run(hub, cache, *arguments, "--resume")  # nothing is trained again
    assert result.returncode == 0, result.stderr
    assert "there is nothing to do" in result.stdout and "uploaded to" in result.stdout
    repository = hub.repositories["org/mine"]
    assert repository.private
    names = {"README.md", "config.json", "curves.png", "metrics.jsonl", "proxy.safetensors"}
    events = {name for name in repository.files if name.startswith("tensorboard/events")}
    assert set(repository.files) == names | events and len(events) == 1
    assert "library_name: assent" in ModelCard(repository.files["README.md"].decode()).content


@pytest.mark.slow  # a minute of imports; tests/proxy/test_hub.py downloads too
def test_a_proxy_is_used_from_there(hub: Hub, tmp_path: Path) -> None:
    proxy = DEMO / "proxies/polite"
    hub.add("org/polite", proxy)
    result = run(
        hub, tmp_path / "cache", "training.evaluate", "--model", DEMO / "model", "--proxy", "org/polite",
        "--reward", "org/polite@main", "--prompts", rows_of("prompts", tmp_path), "--decoding.max-new-tokens", "4",
        "--output", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["proxy_version"] == load(proxy, base=None).version
    assert "org/polite@main" in figures["rewards"]


@pytest.mark.slow  # imports
def test_nothing_is_trained_without_a_token(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    result = run(
        hub, tmp_path / "cache", "training.proxy_dpo", "--model", DEMO / "model",
        "--preferences", rows_of("preferences", tmp_path), "--output", output, "--push-to-hub", "org/mine",
        token=None,
    )  # fmt: skip
    assert result.returncode == 2 and "set HF_TOKEN, or run `hf auth login`" in result.stderr
    assert not output.exists()
