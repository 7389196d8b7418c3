"""Checkpoints from a Hub on this machine, with the real `huggingface_hub`.

In processes of their own: it reads its environment when it is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.checkpoint import load
from tests.hub import TOKEN, Hub, running

ROOT = Path(__file__).parents[2]
POLITE = ROOT / "deploy/demo/proxies/polite"
CODE = """
import json, sys
from proxy.checkpoint import ProxyError, load
from proxy.hub import resolve_dir
for source in sys.argv[1:]:
    try:
        directory = resolve_dir(source)
        files = sorted(path.name for path in directory.iterdir())
        print(json.dumps([load(directory, base=None).version, files]))
    except ProxyError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running() as hub:
        others = {"setup.py": b"raise SystemExit", "spiece.model": b"pieces", "vocab.txt": b"words"}
        hub.add("org/polite", POLITE).files.update(others)
        hub.add("org/secret", POLITE, private=True)
        hub.tags["v1"] = "org/polite"
        yield hub


def resolve(hub: Hub, cache: Path, *sources: str, **environment: str) -> list[Any]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    token = environment.pop("token", None)
    result = subprocess.run(
        [sys.executable, "-c", CODE, *sources],
        env=variables | hub.environment(cache, token=token) | environment,
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_repository_is_a_directory(hub: Hub, tmp_path: Path) -> None:
    version = load(POLITE, base=None).version
    commit = hub.repositories["org/polite"].commit
    names = ["README.md", "config.json", "proxy.safetensors", "spiece.model", "vocab.txt"]
    whole = [version, names]
    found = resolve(hub, tmp_path, "org/polite", "org/polite@v1", f"org/polite@{commit}")
    assert found == [whole] * 3  # the version is the content's, and code is not downloaded
    downloads = [line for line in hub.requests if line.startswith("GET /org/polite/resolve")]
    assert len(downloads) == len(names)

    hub.requests.clear()
    offline = resolve(hub, tmp_path, "org/polite", "org/none", HF_HUB_OFFLINE="1")
    assert offline[0] == whole and "nothing of it is in the cache" in offline[1]
    assert not hub.requests


def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path) -> None:
    absent, secret, revision = resolve(hub, tmp_path, "org/none", "org/secret", "org/polite@v2")
    assert absent.startswith("'org/none' is no directory, and cannot be had from the Hub: ")
    assert "no such repository, or it is private and needs a token (HF_TOKEN)" in absent
    assert "needs a token" in secret
    assert revision.endswith("the repository has no revision 'v2'")
    ((version, _),) = resolve(hub, tmp_path, "org/secret", token=TOKEN)
    assert version == load(POLITE, base=None).version
    (unreachable,) = resolve(hub, tmp_path, "org/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached" in unreachable


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(POLITE, tmp_path / "org" / "polite")
    hub.requests.clear()
    code = f"import os; os.chdir({str(tmp_path)!r})\n{CODE}"
    environment = os.environ | hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, "org/polite"], env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert json.loads(result.stdout)[0] == load(POLITE, base=None).version
    assert not hub.requests
