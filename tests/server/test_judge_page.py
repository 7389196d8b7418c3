"""docs/judge.md: its commands are answered, its principles can be read, its fields and strategies are all there are."""

import json
import re
from pathlib import Path

import httpx
import pytest

from judge.principles import read_principles
from judge.tournament import ONE_CALL, STRATEGIES
from server.schemas.alignment import SampleJudgeOptions
from server.schemas.judge import JudgeRequest
from tests.server.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "judge.md").read_text(encoding="utf-8")
CURL = re.compile(r"curl -s http://127.0.0.1:8000(\S+) [^\n]*-d '(.*?)'", re.DOTALL)


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(("path", "body"), CURL.findall(PAGE))
def test_commands(http: httpx.Client, path: str, body: str) -> None:
    answer = http.post(path, json=json.loads(body))
    # This server stores no feedback, and refuses a good request for that reason.
    assert answer.status_code == (403 if path == "/feedback" else 200), answer.text


def test_principles(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", section("Principles"), re.DOTALL)
    (tmp_path / "principles.toml").write_text(text)
    assert list(read_principles(tmp_path / "principles.toml")) == ["honesty", "brevity"]


def test_every_field_is_documented() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("Compare"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(JudgeRequest.model_fields)
    options = section("Best of N")
    assert all(f'"{name}"' in options for name in SampleJudgeOptions.model_fields)


def test_every_strategy_is_documented() -> None:
    rows = re.findall(r"^\| `(\S+)` \|", section("Rank"), re.MULTILINE)
    assert rows[1:] == [*STRATEGIES, ONE_CALL]  # after the head
