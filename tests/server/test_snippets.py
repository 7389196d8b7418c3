"""Blocks of the documentation that speak to a server, or to none, run as they stand. `tests.pages` lists the others.

The names of the page's model, proxy and judge are replaced by those of the tests' server, and a key is added.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pages import REPOSITORY, Block, program_blocks
from tests.server.conftest import ADMIN_KEY, MODEL, WAIT_SECONDS

RUN = [block for block in program_blocks() if block.reason_not_to_run is None]
NAMES = {
    '"path": "plain"': '"path": "v1"',
    '"plain"': '"aligned"',
    ":plain": ":aligned",
    "smollm2": MODEL,
    '"kind": "probe"': '"kind": "pairwise"',
    'api_key="none"': f'api_key="{ADMIN_KEY}"',
}
STARTS = re.compile(r"^(make serve|python -m server)\b.*$", re.MULTILINE)
"""What the tests' server stands for."""
SHELL = f"""
python() {{ {sys.executable} "$@"; }}
python3() {{ {sys.executable} "$@"; }}
curl() {{ command curl --fail-with-body --max-time {WAIT_SECONDS} -H "Authorization: Bearer {ADMIN_KEY}" "$@"; }}
"""


def adapted(block: Block, url: str) -> str:
    text = STARTS.sub("", block.text).replace("http://127.0.0.1:8000", url)
    for name, replacement in NAMES.items():
        text = text.replace(name, replacement)
    return text


def name_of(block: Block) -> str:
    return f"{block.page} {block.text.splitlines()[0][:40]}"


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=name_of)
def test_python(server, block, capsys):
    values: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(adapted(block, server.url), block.page, "exec"), values)
    if (client := values.get("client")) is not None:
        client.close()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "bash"], ids=name_of)
def test_bash(request: pytest.FixtureRequest, block: Block, tmp_path: Path) -> None:
    is_feedback = "/feedback" in block.text
    server = request.getfixturevalue("feedback_server" if is_feedback else "server")
    text = adapted(block, server.url)
    if is_feedback:
        text = text.replace("feedback.db", str(server.feedback))
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SHELL + text],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip()
    assert '"error"' not in result.stdout


def test_the_closed_form_on_the_page(capsys):
    """docs/how-it-works.md says what it prints."""
    (block,) = (b for b in RUN if b.page == "docs/how-it-works.md" and b.language == "python")
    values: dict[str, Any] = {}
    exec(compile(block.text, block.page, "exec"), values)
    # Standard errors are 0.0011 at most; the seed is fixed.
    assert (values["frequencies"] - values["exact"]).abs().max() < 0.003
    # By hand: 0.6·0.2 + 0.3·0.1·(6/7)·0.2 + 0.1·0.5·(6/9)·0.2 for the first, and so on; the rest is forced.
    assert values["exact"].tolist() == pytest.approx([0.278857, 0.609, 0.112143], abs=1e-6)


def test_there_are_blocks_of_both_languages():
    assert {block.language for block in RUN} == {"bash", "python"} and len(RUN) > 8
